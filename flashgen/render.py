"""`render`: spec and variant in, kernel source out. Pure: no torch, no GPU, no version probing, no clock."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from flashgen.assets import templates_dir
from flashgen.errors import RenderError, UnsupportedProblemError
from flashgen.spec import AttentionSpec
from flashgen.variants import Variant

if TYPE_CHECKING:
    import jinja2


@dataclass(frozen=True, kw_only=True)
class KernelSource:
    """A rendered kernel file.

    Attributes:
        text: the Python source.
        spec: what it computes.
        variant: name of the variant it was rendered from.
    """

    text: str
    spec: AttentionSpec
    variant: str

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the text, in hex: part of every cache and database key."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def name(self) -> str:
        """File name: `<spec.key>-<digest8>.py`."""
        return f"{self.spec.key}-{self.digest[:8]}.py"


@cache
def _environment() -> jinja2.Environment:
    import jinja2  # here: importing flashgen must not

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_dir()),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Python source, not HTML
    )


@lru_cache(maxsize=256)
def render(spec: AttentionSpec, variant: Variant) -> KernelSource:
    """Render the kernel file of a spec.

    Args:
        spec: what to compute.
        variant: which recipe; must have a template.

    Returns:
        The source; the same text for the same arguments, always.

    Raises:
        UnsupportedProblemError: the variant has no template.
        RenderError: the template is missing or broken; names file and line.
    """
    if variant.template is None:
        raise UnsupportedProblemError(f"variant {variant.name} is not generated: it has no template to render.")
    if spec.mods is not None and spec.mods.program is None:
        raise RenderError(
            f"{spec.key} names its mods by a digest: what they compute is not in it. Render a problem that has them, "
            "Problem.modified(score_mod=..., mask_mod=...)."
        )
    text = render_template(
        variant.template, spec=spec, variant=variant, meta={"template": f"templates/{variant.template}"}
    )
    return KernelSource(text=text if spec.mods is None else filled(text), spec=spec, variant=variant.name)


# An opening bracket at the end of a line, arguments that have a line each, and what closes it; those with a comment or a bracket of their own stay.
_LISTED = re.compile(
    r"^( *)(\S.*[(\[]|[(\[])\n((?:\1    [^ \n#][^\n#]*,\n){2,})\1([)\]][^\n]*)\n(?:\n(?= ))?", re.MULTILINE
)
_STRINGS = re.compile(r'("""(?s:.*?)""")')
_WIDTH = 120


def filled(text: str) -> str:
    """A kernel whose lists of arguments fill their lines, as by hand: with tables and masks there are dozens, handed from function to function.

    The formatter would give each a line; `# fmt: off` after the imports tells it to leave them. What Python reads is the same.
    """
    imports = re.search(r"\n\n+(?!import |from )(?=[^\s])", text[text.index('\n"""\n') + 5 :])
    start = text.index('\n"""\n') + 5 + (imports.end() if imports else 0)
    parts = _STRINGS.split(text[start:])  # texts in three quotes, which stay, at odd places
    parts[::2] = (_LISTED.sub(_in_lines, part) for part in parts[::2])
    return f"{text[:start]}# fmt: off\n{''.join(parts)}"


def _in_lines(found: re.Match[str]) -> str:
    pad, opening, listed, closing = found.groups()
    arguments = [line.strip() for line in listed.splitlines()]
    if any(one.count(start) != one.count(end) for one in arguments for start, end in ("()", "[]")):
        return found[0]
    whole = f"{pad}{opening}{' '.join(arguments)[:-1]}{closing}"
    if len(whole) <= _WIDTH:
        return whole + "\n"
    lines = [arguments[0]]
    for one in arguments[1:]:
        if len(pad) + 4 + len(lines[-1]) + 1 + len(one) > _WIDTH:
            lines.append(one)
        else:
            lines[-1] += " " + one
    return f"{pad}{opening}\n" + "".join(f"{pad}    {line}\n" for line in lines) + f"{pad}{closing}\n"


def render_template(name: str, *, spec: AttentionSpec, variant: Variant, meta: dict[str, Any]) -> str:
    """Render one template with the three names that templates know.

    Raises:
        RenderError: the template is missing or broken; names file and line.
    """
    import jinja2

    try:
        return _environment().get_template(name).render(spec=spec, variant=variant, meta=meta)
    except jinja2.TemplateSyntaxError as error:
        raise RenderError(f"{error.filename or name}:{error.lineno}: {error.message}") from error
    except jinja2.TemplateError as error:
        raise RenderError(f"{name} could not be rendered for {spec.key}: {error}") from error
