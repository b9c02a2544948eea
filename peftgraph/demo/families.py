"""Lists the families of Python's standard library that the quickstart tells apart, and the modules of each.

A name that ends in `.*` means a package and every module directly inside it. Modules that the running Python does not
have are skipped.
"""

from __future__ import annotations

from collections.abc import Mapping

_MODULES = {
    "networking": """
        socket socketserver ssl select selectors ipaddress ftplib smtplib poplib imaplib nntplib telnetlib smtpd
        asynchat asyncore http.* urllib.* xmlrpc.* wsgiref.* cgi webbrowser netrc
    """,
    "concurrency": """
        threading queue sched contextvars signal subprocess asyncio.* concurrent.futures.* multiprocessing.*
        multiprocessing.dummy.*
    """,
    "files and archives": """
        os posixpath ntpath genericpath posix pathlib pathlib.* shutil glob fnmatch tempfile stat filecmp
        fileinput io mmap pwd grp fcntl linecache shelve dbm.* zlib gzip bz2 lzma zipfile zipfile.* tarfile
        zipapp
    """,
    "mail and markup": """
        email.* email.mime.* mailbox mimetypes base64 quopri html.* xml.* xml.dom.* xml.sax.* xml.etree.*
        xml.parsers.*
    """,
    "numbers and dates": """
        math cmath decimal fractions random statistics numbers datetime calendar time zoneinfo.* colorsys
        secrets
    """,
    "testing and debugging": """
        unittest.* doctest pdb bdb trace traceback faulthandler cProfile profile pstats timeit tracemalloc
        logging.* warnings
    """,
    "imports and code": """
        importlib.* importlib.metadata.* importlib.resources.* inspect dis opcode pkgutil runpy modulefinder
        symtable compileall py_compile pyclbr zipimport imp ensurepip.* venv.* ast tokenize site codeop code
    """,
    "graphics": """
        tkinter.* turtle curses.* idlelib.*
    """,
}

FAMILIES: Mapping[str, tuple[str, ...]] = {family: tuple(names.split()) for family, names in _MODULES.items()}
