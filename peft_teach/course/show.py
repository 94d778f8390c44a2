"""What the course shows: cards (verdicts, hints, banners), in a notebook and in a terminal; figures."""

from __future__ import annotations

import html
import io
import sys
from dataclasses import dataclass, field
from typing import Any

# JupyterLab's own variables, so that a card follows the theme; the fallbacks are for other readers.
_STYLE = (
    "border-left:4px solid {edge}; padding:.4em .8em; margin:.3em 0; "
    "background:var(--jp-layout-color1, transparent); color:var(--jp-content-font-color1, inherit)"
)
_EDGES = {"✓": "var(--jp-success-color1, #388e3c)", "✗": "var(--jp-error-color1, #d32f2f)"}


@dataclass
class Card:
    """A title, lines beneath it, and what is folded: [(title, text)]. A line may be (label, text)."""

    title: str
    lines: list = field(default_factory=list)
    folded: list[tuple[str, str]] = field(default_factory=list)
    code: str = ""

    def text(self) -> str:
        width = max([len(line[0]) for line in self.lines if isinstance(line, tuple)], default=0)
        out = [self.title]
        for line in self.lines:
            label, body = line if isinstance(line, tuple) else ("", line)
            pad = f"{label:<{width}}  " if isinstance(line, tuple) else ""
            out += [f"  {pad if i == 0 else ' ' * len(pad)}{part}" for i, part in enumerate(body.split("\n"))]
        if self.code:
            out += ["", self.code.rstrip()]
        for title, body in self.folded:
            out += ["", f"  {title}:"] + [f"    {part}" for part in body.rstrip().split("\n")]
        return "\n".join(out)

    def html(self) -> str:
        escape = lambda s: html.escape(s).replace("\n", "<br>")  # noqa: E731
        pre = "<pre style='margin:.3em 0; white-space:pre-wrap; font-size:90%; color:inherit; background:transparent'>"
        edge = _EDGES.get(self.title[:1], "var(--jp-border-color1, #9e9e9e)")
        out = [f"<div style='{_STYLE.format(edge=edge)}'><b>{escape(self.title)}</b>"]
        for line in self.lines:
            if isinstance(line, tuple):
                label, body = line
                aligned = "\n" in body and "  " in body  # numbers in columns, or code
                value = f"{pre}{html.escape(body)}</pre>" if aligned else escape(body)
                out.append(f"<div><span style='opacity:.75'>{escape(label)}</span>&ensp;{value}</div>")
            else:
                out.append(f"<div>{escape(line)}</div>")
        if self.code:
            out.append(f"{pre}{html.escape(self.code.rstrip())}</pre>")
        for title, body in self.folded:
            out.append(f"<details><summary>{escape(title)}</summary>{pre}{html.escape(body)}</pre></details>")
        return "".join(out) + "</div>"

    __repr__ = __str__ = text

    def _repr_html_(self) -> str:
        return self.html()

    def display(self) -> None:
        """Show it now: in a notebook as HTML, elsewhere as text."""
        if in_notebook():
            from IPython.display import display

            display(self)
        else:
            print(self.text())


def in_notebook() -> bool:
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return bool(shell) and hasattr(shell, "kernel")


def _has_numbers(axis: Any) -> bool:
    """Are there numbers along it? A colour bar has none across, shared axes only at the edge."""
    drawn = any(axis.get_tick_params().get(f"label{side}") for side in ("bottom", "top", "left", "right"))
    return axis.get_visible() and drawn and len(axis.get_ticklocs()) > 0


def show(fig: Any, alt: str, fact: str) -> None:
    """Show a matplotlib figure. `alt` says what is to be seen; `fact`, the number to take away, is printed.

    ValueError when an axis with numbers along it lacks a label, or alt is empty: some readers only have those.
    """
    if not alt.strip():
        raise ValueError("alt must say in a sentence what the figure shows")
    for axes in fig.axes:
        if axes.axison and any(_has_numbers(axis) and not axis.get_label_text() for axis in (axes.xaxis, axes.yaxis)):
            raise ValueError(f"axes {axes.get_title()!r} need a label on x and on y, with units")
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(fig)
    if in_notebook():
        from IPython.display import display

        data = {"image/png": buffer.getvalue(), "text/plain": f"Figure: {alt}"}
        display(data, metadata={"image/png": {"alt": alt}}, raw=True)
    print(fact)
