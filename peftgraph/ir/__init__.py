"""The program's data: graph, table, signature, edits; its printer, builder and verifier."""
