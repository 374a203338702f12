"""Formulas of the book, from TeX to Typst: the commands that the book uses, and no others.

A command that is not in the tables below is an error, so that no formula is set wrongly or left out in silence.
"""

import re
from collections.abc import Callable

# TeX command -> what Typst's mathematics calls it
SYMBOLS = {
    "alpha": "alpha", "beta": "beta", "gamma": "gamma", "delta": "delta", "epsilon": "epsilon.alt", "eta": "eta",
    "theta": "theta", "kappa": "kappa", "lambda": "lambda", "mu": "mu", "pi": "pi", "rho": "rho", "sigma": "sigma",
    "tau": "tau", "phi": "phi.alt", "varphi": "phi", "omega": "omega", "Delta": "Delta", "Gamma": "Gamma",
    "Lambda": "Lambda", "Omega": "Omega", "Phi": "Phi", "Pi": "Pi", "Sigma": "Sigma", "ell": "ell", "nabla": "nabla",
    "infty": "infinity", "partial": "partial", "le": "lt.eq", "leq": "lt.eq", "ge": "gt.eq", "geq": "gt.eq",
    "ne": "eq.not", "neq": "eq.not", "approx": "approx", "equiv": "equiv", "sim": "tilde.op", "ll": "lt.double",
    "gg": "gt.double", "in": "in", "notin": "in.not", "subset": "subset", "subseteq": "subset.eq", "cap": "inter",
    "cup": "union", "setminus": "without", "to": "arrow.r", "mapsto": "arrow.r.bar", "Rightarrow": "arrow.r.double",
    "times": "times", "cdot": "dot.op", "pm": "plus.minus", "mp": "minus.plus", "odot": "dot.o", "circ": "compose",
    "dots": "dots.h", "ldots": "dots.h", "cdots": "dots.h.c", "top": "top", "perp": "perp", "mid": "divides",
    "sum": "sum", "prod": "product", "int": "integral", "forall": "forall", "exists": "exists", "prime": "prime",
    "varepsilon": "epsilon", "cos": "cos", "sin": "sin",
    "log": "log", "exp": "exp", "min": "min", "max": "max", "arg": "arg", "sup": "sup", "inf": "inf", "det": "det",
    "Pr": "Pr", "langle": "chevron.l", "rangle": "chevron.r", "lfloor": "floor.l", "rfloor": "floor.r",
    "lceil": "ceil.l", "rceil": "ceil.r", "lbrace": "brace.l", "rbrace": "brace.r", "{": "brace.l", "}": "brace.r",
    "quad": "quad", "qquad": "wide", ",": "thin", ":": "med", ";": "thick", " ": "space.nobreak", "!": "#h(-0.17em)",
    "%": "%", "#": "\\#", "_": "\\_", "&": "\\&", "$": "\\$",
}  # fmt: skip
FENCES = {"lVert": ("opening", "bar.v.double"), "rVert": ("closing", "bar.v.double"),
          "lvert": ("opening", "bar.v"), "rvert": ("closing", "bar.v")}  # fmt: skip
# these come in pairs of the same sign: the first of a group opens, the second closes
PAIRS = {"\\|": "bar.v.double", "|": "bar.v"}
# one argument
FUNCTIONS = {
    "hat": "hat", "tilde": "tilde", "bar": "overline", "overline": "overline", "vec": "arrow", "sqrt": "sqrt",
    "mathcal": "cal", "mathbb": "bb", "mathbf": "bold", "mathrm": "upright", "mathsf": "sans", "mathit": "italic",
}  # fmt: skip
SIZES = {"big": "1.2em", "Big": "1.8em", "bigg": "2.4em", "Bigg": "3em"}
CHARACTERS = {
    "(": "\\(", ")": "\\)", "[": "\\[", "]": "\\]", ",": "\\,", ";": "\\;", "/": "\\/", "<": "lt", ">": "gt",
    "*": "ast.op", "~": "space.nobreak", "#": "\\#", "@": "\\@", '"': '\\"', "$": "\\$", "`": "\\`",
}  # fmt: skip
_TOKEN = re.compile(r"\\(?:[A-Za-z]+|.|\n)|\d+(?:\.\d+)?|\s+|.", re.S)


def to_typst(tex: str) -> str:
    """A formula as Typst's mathematics, without the signs around it.

    Raises:
        ValueError: for a command that this module does not know, or braces that do not match.
    """
    return _Formula(tex).read()


class _Formula:
    def __init__(self, tex: str) -> None:
        self.tex = tex
        self.tokens = [token for token in _TOKEN.findall(tex) if not token.isspace()]
        # a command such as \text takes what stands between its braces as it is
        self.raw = _TOKEN.findall(tex)
        self.places = [place for place, token in enumerate(self.raw) if not token.isspace()]
        self.at = 0

    def read(self) -> str:
        result = self._until(lambda token: False)
        if self.at < len(self.tokens):
            raise self._error(f"nothing that opens {self.tokens[self.at]!r}")
        return result

    def _error(self, what: str) -> ValueError:
        return ValueError(f"formula {self.tex!r}: {what}")

    def _next(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def _take(self) -> str:
        if (token := self._next()) is None:
            raise self._error("it ends too early")
        self.at += 1
        return token

    def _until(self, ends: Callable[[str], bool]) -> str:
        """Atoms with their scripts, up to a token that ends them."""
        parts: list[str] = []
        opened: dict[str, bool] = {}
        while (token := self._next()) is not None and not ends(token) and token != "}":
            parts.append(self._scripts(self._atom(opened)))
        return _joined(parts)

    def _scripts(self, base: str) -> str:
        sub = sup = primes = ""
        while (token := self._next()) in ("_", "^", "'"):
            self._take()
            if token == "'":
                primes += "'"
            elif token == "_":
                sub = self._argument()
            else:
                sup = self._argument()
        if base.startswith("underbrace("):
            return f"{base[:-1]}, {sub})" if sub else base
        return base + primes + f"_({sub})" * bool(sub) + f"^({sup})" * bool(sup)

    def _argument(self) -> str:
        """What stands in braces, or one atom."""
        if self._next() == "{":
            return self._group()
        token = self._next() or ""
        if token.isdecimal() and len(token) > 1:
            # of a number without braces TeX takes one digit
            self.tokens[self.at] = token[1:]
            return token[0]
        return self._atom({})

    def _group(self) -> str:
        self._take()
        inside = self._until(lambda token: False)
        if self._next() != "}":
            raise self._error("a brace is not closed")
        self._take()
        return inside

    def _verbatim(self) -> str:
        """The letters between braces, spaces and all."""
        if self._take() != "{":
            raise self._error("expected a brace")
        begin = self.places[self.at - 1] + 1
        depth = 1
        while depth:
            token = self._take()
            depth += (token == "{") - (token == "}")
        return "".join(self.raw[begin : self.places[self.at - 1]])

    def _atom(self, opened: dict[str, bool]) -> str:
        token = self._next()
        if token == "{":
            inside = self._group()
            return f'class("normal", {inside})' if self._next() in ("_", "^") and " " in inside else inside
        token = self._take()
        if token in PAIRS:
            opened[token] = not opened.get(token, False)
            return f'class("{"opening" if opened[token] else "closing"}", {PAIRS[token]})'
        if token[0] == "\\":
            return self._command(token[1:])
        return CHARACTERS.get(token, token)

    def _command(self, name: str) -> str:
        if name in SYMBOLS:
            return SYMBOLS[name]
        if name in FENCES:
            return 'class("{}", {})'.format(*FENCES[name])
        if name in FUNCTIONS:
            return f"{FUNCTIONS[name]}({self._argument()})"
        if name in ("frac", "dfrac"):
            return f"frac({self._argument()}, {self._argument()})"
        if name == "tfrac":
            return f"inline(frac({self._argument()}, {self._argument()}))"
        if name == "underbrace":
            return f"underbrace({self._argument()})"
        if name in ("text", "textbf", "textit"):
            return _string(self._verbatim())
        if name == "operatorname":
            return f"op({_string(self._verbatim())})"
        if name == "begin":
            return self._cases()
        if name[:-1] in SIZES and name[-1] == "l":
            return self._sized(SIZES[name[:-1]], name[:-1] + "r")
        if name == "left":
            return self._sized("", "right")
        if name in SIZES:
            return f"stretch({self._delimiter()}, size: #{SIZES[name]})"
        raise self._error(f"the command \\{name} is not one that tools/typst_math.py knows")

    def _delimiter(self) -> str:
        token = self._take()
        known = {"(": "paren.l", ")": "paren.r", "[": "bracket.l", "]": "bracket.r", "/": "slash", ".": ""}
        return known.get(token) or PAIRS.get(token) or ("" if token == "." else SYMBOLS[token[1:]])

    def _sized(self, size: str, end: str) -> str:
        """A pair of large delimiters with what stands between them."""
        left = self._delimiter()
        inside = self._until(lambda token: token == f"\\{end}")
        if self._next() != f"\\{end}":
            raise self._error(f"a delimiter is not closed by \\{end}")
        self._take()
        return f"lr({left} {inside} {self._delimiter()}" + f", size: #{size}" * bool(size) + ")"

    def _cases(self) -> str:
        if (kind := self._verbatim()) != "cases":
            raise self._error(f"the environment {kind} is not one that tools/typst_math.py knows")
        rows, cells = [], []
        while True:
            cells.append(self._until(lambda token: token in ("&", "\\\\", "\\end")))
            if (token := self._take()) != "&":
                rows.append(" & quad ".join(cells))
                cells = []
            if token == "\\end":
                self._verbatim()
                return f"cases({', '.join(rows)})"


def _joined(parts: list[str]) -> str:
    """Atoms side by side: no space at a text, since Typst would show it."""
    result = ""
    for part in parts:
        text = part.startswith('"') or result.endswith('"')
        result += part if text or not result else f" {part}"
    return result


def _string(text: str) -> str:
    text = re.sub(r"\s+", " ", text.replace("``", "“").replace("''", "”")).replace("\\ ", " ")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
