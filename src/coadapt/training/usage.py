"""Which adapter a router used how much: read from a folder, as a table and as a picture."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text
from torch import Tensor

from coadapt.core.composition import Node, routers, trained_gates
from coadapt.core.gates import layer_of
from coadapt.formats import checkpoint
from coadapt.formats.checkpoint import EXTRA
from coadapt.formats.compositions import node_from_json
from coadapt.formats.files import CHECKPOINT, COMPOSITION, GATES, read_json, read_tensors
from coadapt.training.monitor import label
from coadapt.training.palette import GREY, adapter_colors

OUTSIDE = "outside of layers"


@dataclass(frozen=True, kw_only=True)
class Used:
    """What one router did while it was trained."""

    router: str
    """With the options that it has, and what it chooses from."""
    children: Sequence[str]
    sites: Mapping[str, Mapping[str, float]]
    """Site -> child -> mean gate over real tokens (or rows)."""

    def layers(self) -> dict[str, dict[str, float]]:
        """Layer -> child -> mean gate over the layer's sites."""
        grouped: dict[str, list[Mapping[str, float]]] = {}
        for site, gates in self.sites.items():
            grouped.setdefault(layer_of(site.rpartition(":")[2]) or OUTSIDE, []).append(gates)
        return {layer: self._mean(found) for layer, found in grouped.items()}

    def overall(self) -> dict[str, float]:
        """Child -> mean gate over all sites."""
        return self._mean(list(self.sites.values()))

    def _mean(self, sites: Sequence[Mapping[str, float]]) -> dict[str, float]:
        every = {c: [gates[c] for gates in sites if c in gates] for c in self.children}
        return {child: sum(found) / len(found) for child, found in every.items() if found}


def read_usage(folder: Path) -> list[Used]:
    """What the routers of a folder, or of a Trainer's checkpoint, did in training; empty where it has none."""
    if (folder / COMPOSITION).is_file():
        node = node_from_json(read_json(folder / COMPOSITION)["composition"])
        return _used(node, read_tensors(folder / GATES), "gate_{}.") if routers(node) else []
    if (folder / CHECKPOINT).is_file():
        state = read_tensors(folder / CHECKPOINT)
        return _used(node_from_json(checkpoint.read(state[EXTRA])["composition"]), state, "gates.{}.")
    return []


def _used(node: Node, tensors: Mapping[str, Tensor], prefix: str) -> list[Used]:
    gates = trained_gates(node)
    out: list[Used] = []
    for router, found in routers(node):
        start = prefix.format(gates.index(router)) + "sites./"
        own = {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}
        names = [label(child) for child in found.children]
        sites: dict[str, dict[str, float]] = {}
        for key in (k.removesuffix(".used") for k in own if k.endswith(".used")):
            if float(own[f"{key}.count"]):
                shares = (own[f"{key}.used"] / own[f"{key}.count"]).tolist()
                sites[key.replace("/", ".")] = {
                    names[c]: share for c, share in zip(own[f"{key}.of"].tolist(), shares, strict=True)
                }
        out.append(Used(router=repr(found), children=names, sites=sites))
    return out


def usage_tables(used: Sequence[Used]) -> Iterable[Table | Text]:
    """A table for each router: the mean gate of each adapter, layer by layer."""
    for found in used:
        yield Text("")
        if not found.sites:
            yield Text(f"{found.router} was not in training yet, so nothing is known of what it uses.", "dim")
            continue
        yield Text(f"{found.router} · mean gate, by layer", "bold")
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("layer", overflow="fold")
        for child in found.children:
            table.add_column(child, justify="right")
        for layer, gates in found.layers().items():
            table.add_row(layer, *(_figure(gates, child) for child in found.children))
        table.add_row("all", *(_figure(found.overall(), child) for child in found.children), style="bold")
        yield table


def _figure(gates: Mapping[str, float], child: str) -> str:
    return f"{gates[child]:.3f}" if child in gates else "-"


def draw_usage(used: Sequence[Used], file: Path) -> None:
    """A bar for each layer, parted by how much each adapter was used there, as a PNG.

    Raises:
        ValueError: no router was in training.
    """
    known = [found for found in used if found.sites]
    if not known:
        raise ValueError("There is nothing to draw: no router of this folder has been in training.")
    heights = [1.0 + 0.28 * len(found.layers()) for found in known]
    figure = Figure(figsize=(7.2, sum(heights)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(known), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, found in zip(panels, known, strict=True):
        layers = found.layers()
        colors = adapter_colors(dict.fromkeys(found.children))
        left = [0.0] * len(layers)
        for child in found.children:
            widths = [gates.get(child, 0.0) for gates in layers.values()]
            bars = axes.barh(range(len(layers)), widths, left=left, color=colors[child], height=0.78, label=child)
            axes.bar_label(bars, [f"{w:.2f}" if w >= 0.07 else "" for w in widths], label_type="center", color="white")
            left = [a + w for a, w in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(layers)), list(layers))
        axes.invert_yaxis()
        axes.set_title(found.router, loc="left", fontsize="medium")
        axes.set_xlabel("mean gate", color=GREY)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(file, format="png")
