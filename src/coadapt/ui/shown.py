"""Pieces of the page, as HTML: whatever comes from files or people is escaped."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from coadapt.ui.runs import Standing

if TYPE_CHECKING:
    from coadapt.training.data_check import DataCheck
    from coadapt.training.estimate import Estimate

PART_COLORS = ("#2b6cb0", "#0d9488", "#9d4edd", "#d9730d", "#c2255c")
"""Of base, adapters, gradients, optimiser, activations."""


def note(text: str) -> str:
    """Something quiet, in place of what is not there yet."""
    return f'<div class="ca-note">{escape(text)}</div>'


def error(text: str) -> str:
    """What is wrong, and what to do."""
    return f'<div class="ca-error" role="alert">{_lines(text)}</div>' if text else ""


def _lines(text: str) -> str:
    return "<br>".join(escape(line) for line in text.splitlines())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a head; it scrolls by itself where it is too wide."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    inner = f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="ca-scroll"><table class="ca-table">{inner}</table></div>'


def facts(pairs: Mapping[str, str]) -> str:
    """Names with values."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{_lines(value)}</td></tr>" for name, value in pairs.items())
    return f'<div class="ca-scroll"><table class="ca-facts"><tbody>{rows}</tbody></table></div>'


def standing(name: str, found: Standing, more: Mapping[str, str]) -> str:
    """How a run stands, and a few figures."""
    figures = "".join(
        f'<span class="ca-figure">{escape(label)} <b>{escape(value)}</b></span>' for label, value in more.items()
    )
    return (
        f'<div class="ca-standing ca-{found.state}"><div><span class="ca-state">{found.state}</span>'
        f'<span class="ca-name">{escape(name)}</span></div><div class="ca-said">{_lines(found.said)}</div>'
        f'<div class="ca-figures">{figures}</div></div>'
    )


def estimate(found: "Estimate") -> str:
    """What a run will need: the verdict, a bar of what the memory goes to, and the figures."""
    from coadapt.training.estimate import KEPT, MOST
    from coadapt.training.estimate_table import batch, flops, seconds
    from coadapt.training.units import size

    parts = found.parts
    whole = sum(count for count, _ in parts.values()) or 1
    bar = "".join(
        f'<i style="width:{100 * count / whole:.2f}%;background:{color}" title="{escape(name)}"></i>'
        for (name, (count, _)), color in zip(parts.items(), PART_COLORS, strict=True)
    )
    legend = "".join(
        f'<span><i style="background:{color}"></i>{escape(name)} {size(count)}</span>'
        for (name, (count, _)), color in zip(parts.items(), PART_COLORS, strict=True)
    )
    most = found.largest_batch
    told = f"{most:,} rows of this length" if most < MOST else f"more than {MOST:,} rows of this length"
    rows = {
        "trains": f"{found.trainable:,} of {found.parameters:,} parameters ({found.share:.2%})",
        "batch": batch(found),
        "memory": f"{size(found.peak)} at most; {size(found.room.free)} of {size(found.room.total)} are free "
        f"({found.device}), of which {KEPT:.0%} are left alone",
        "largest batch": told if most else "not even one row fits",
        "time of a step": f"at least {seconds(found.seconds)}: {flops(found.operations)}, {flops(found.rate)}/s in a "
        "product of matrices here",
    }
    verdict = "It fits." if found.fits else "It does not fit. Take a smaller batch, shorter rows or a smaller model."
    kind = "ca-good" if found.fits else "ca-bad"
    return (
        f'<div class="{kind}">{escape(verdict)}</div><div class="ca-bar">{bar}</div>'
        f'<div class="ca-legend">{legend}</div>{facts(rows)}'
    )


def data(checks: Sequence["DataCheck"], first: Sequence[Mapping[str, Any]]) -> str:
    """What the data is, what is wrong with it and what to do, its first rows, and one row with what is trained on."""
    return "".join(_data(check) for check in checks) + rows(first)


def _data(check: "DataCheck") -> str:
    roles = ", ".join(c if role == c else f"{c} → {role}" for role, c in check.columns.items())
    known = {"format": f"{check.format} ({roles}), for {check.task}"}
    for split in check.splits:
        lengths = split.lengths
        unit = "" if lengths is None else f", {lengths.least:,} to {lengths.most:,} {lengths.unit}"
        known[split.name] = f"{split.rows:,} {'text' if check.document else 'rows'}{unit}"
    known |= {"note": "\n".join(check.notes)} if check.notes else {}
    if check.fine:
        told = '<div class="ca-good">Nothing was found that should be changed.</div>'
    else:
        each = "".join(
            f"<li><b>{escape(f.what)}</b>, {escape(f.split)}: {escape(f.said)}<br><span>→ {escape(f.mend)}</span></li>"
            for f in check.findings
        )
        told = f'<div class="ca-bad">To change, or to know:</div><ul class="ca-findings">{each}</ul>'
    return (
        f"{told}{facts(known)}{label('one row; what is trained on stands between ⟦ and ⟧')}{code(check.sample.plain)}"
    )


def label(text: str) -> str:
    """A small heading."""
    return f'<div class="ca-label">{escape(text)}</div>'


def quiet(text: str) -> str:
    """Something to know, beside what matters."""
    return f'<div class="ca-quiet">{escape(text)}</div>' if text else ""


def code(text: str) -> str:
    """A short text of a fixed width."""
    return f'<pre class="ca-sample">{escape(text)}</pre>'


def rows(first: Sequence[Mapping[str, Any]], most: int = 160) -> str:
    """The first rows as they are, long cells cut."""
    if not first:
        return ""
    head = list(first[0])
    cells = [[_cut(str(row.get(name, "")), most) for name in head] for row in first]
    return label(f"the first {len(first)} rows") + table(head, cells)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} …"


STYLE = """
.ca-head {display:flex; align-items:baseline; gap:.8rem; padding:.3rem 0 0}
.ca-head b {font-size:1.35rem; letter-spacing:-.01em}
.ca-head span {color:var(--body-text-color-subdued); font-size:.9rem}
.ca-act {max-width:20rem}
.ca-note {color:var(--body-text-color-subdued); padding:1.4rem 1rem; text-align:center;
  border:1px dashed var(--border-color-primary); border-radius:8px}
.ca-error {border-left:3px solid #c92a2a; background:color-mix(in srgb, #c92a2a 9%, transparent);
  padding:.6rem .8rem; border-radius:4px; overflow-wrap:anywhere}
.ca-good, .ca-bad {font-weight:600; padding:.2rem 0 .5rem}
.ca-good::before, .ca-bad::before {content:""; display:inline-block; width:.6rem; height:.6rem; border-radius:50%;
  margin-right:.5rem; background:#2f9e44}
.ca-bad::before {background:#d9730d}
.ca-scroll {overflow-x:auto}
.ca-table, .ca-facts {border-collapse:collapse; width:100%; font-size:.88rem; margin:.3rem 0}
.ca-table, .ca-facts, .ca-table tr, .ca-facts tr, .ca-table thead, .ca-table tbody, .ca-facts tbody {
  border:0 !important; background:none !important}
.ca-table th, .ca-table td, .ca-facts th, .ca-facts td {text-align:left; vertical-align:top;
  border:0 !important; border-bottom:1px solid var(--border-color-primary) !important;
  padding:.35rem .8rem .35rem 0 !important; color:var(--body-text-color)}
.ca-table td {white-space:pre-wrap; overflow-wrap:break-word; min-width:5rem}
.ca-facts th {white-space:nowrap; font-weight:500; color:var(--body-text-color-subdued); width:1%}
.ca-table th {font-weight:500; color:var(--body-text-color-subdued)}
.ca-bar {display:flex; height:.8rem; border-radius:4px; overflow:hidden; background:var(--border-color-primary)}
.ca-bar i {display:block; height:100%}
.ca-legend {display:flex; flex-wrap:wrap; gap:.2rem 1rem; font-size:.8rem; padding:.4rem 0;
  color:var(--body-text-color-subdued)}
.ca-legend i {display:inline-block; width:.6rem; height:.6rem; border-radius:2px; margin-right:.35rem}
.ca-plot {border:1px solid var(--border-color-primary); border-radius:6px; padding:.6rem .8rem .3rem}
.ca-plot svg {width:100%; height:auto; display:block}
.ca-plot svg text {font-family:var(--font) !important}
.ca-title {font-size:.85rem; font-weight:500; padding-bottom:.2rem}
.ca-plots {display:grid; grid-template-columns:repeat(auto-fit, minmax(300px, 1fr)); gap:.8rem; margin-top:.8rem}
.ca-label {font-size:.8rem; color:var(--body-text-color-subdued); padding-top:.7rem}
.ca-sample {white-space:pre-wrap; overflow-wrap:anywhere; font-family:var(--font-mono); font-size:.82rem;
  background:var(--background-fill-secondary); padding:.6rem .8rem; border-radius:6px; margin:.2rem 0; max-height:14rem;
  overflow:auto}
.ca-findings {margin:.2rem 0 .6rem 1.1rem; font-size:.9rem; list-style:disc}
.ca-findings span {color:var(--body-text-color-subdued)}
.ca-standing {border-left:4px solid var(--border-color-primary); padding:.2rem 0 .2rem .9rem}
.ca-state {font-size:.75rem; font-weight:600; padding:.1rem .5rem; border-radius:99px; margin-right:.6rem;
  color:#fff; background:#868e96}
.ca-name {font-weight:600; font-size:1.05rem; overflow-wrap:anywhere}
.ca-running {border-color:#2b6cb0} .ca-running .ca-state {background:#2b6cb0}
.ca-done {border-color:#2f9e44} .ca-done .ca-state {background:#2b8a3e}
.ca-failed {border-color:#c92a2a} .ca-failed .ca-state {background:#c92a2a}
.ca-said {padding:.3rem 0; overflow-wrap:anywhere}
.ca-figures {display:flex; flex-wrap:wrap; gap:.2rem 1.4rem; color:var(--body-text-color-subdued); font-size:.85rem}
.ca-figure b {color:var(--body-text-color); font-weight:600}
.ca-log textarea {font-family:var(--font-mono) !important; font-size:.78rem !important}
.ca-list .wrap {flex-direction:column; flex-wrap:nowrap; max-height:30rem; overflow-y:auto}
.ca-list label {width:100%; overflow-wrap:anywhere}
.ca-quiet {font-size:.9rem; color:var(--body-text-color-subdued)}
footer {display:none !important}
"""
"""Colours beside those of the theme are readable on white and on black."""
