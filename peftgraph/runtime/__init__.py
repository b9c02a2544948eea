"""Program -> nn.Module and files."""
