"""What turns sources into a book: run a chapter, publish its twin, check the whole. No mathematics here."""

import sys
from typing import Any, cast

# for its check of IRIs, which no notebook holds, jsonschema (imported by nbformat) builds a grammar: seconds a process
cast("dict[str, Any]", sys.modules).setdefault("rfc3987_syntax", None)
