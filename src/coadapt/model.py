"""PeftModel: a view of a frozen base, and its verbs."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from . import quant as quant  # quantised bases are known from now on
from .combining import Options, Report, combine
from .combining.field import translated
from .config import PeftConfig
from .core import composition, merging, replication
from .core.adapter import build, replace_options, start_from
from .core.base_model import BaseModel
from .core.composition import Node
from .core.method import method_for
from .core.repacking import MergeReport, dequantise
from .core.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from .core.store import count
from .core.view import View
from .formats import checkpoint, folder
from .formats.package import pack, place_of
from .methods.lora import LoraConfig
from .methods.xlora import XLoraConfig
from .naming import check_name
from .param_groups import param_groups
from .verifying import Proof, verify


class PeftModel(View):
    """A view of a base model: adapters of its own, a composition of them that is active, and the base's interface.

    The base keeps its class, keys, weights and behaviour; several views can share it. What is active in a call is the
    call's `adapters` or `adapter_names`, else what `using` says on this thread, else what `set_adapter` said.

    Args:
        model: the base. It is frozen; when its last view goes, what trained before trains again. With a LoRA's
            `layer_replication` the view has a base of its own, around the same weights.
        peft_config: the first adapter. Its name is `adapter_name`, or the configuration's own, or "default".
        autocast_adapter_dtype: keep the adapters in fp32 where the base is bf16 or fp16.
    """

    _hf_peft_config_loaded = True  # what transformers' Trainer asks of a model with a frozen, quantised base

    merge_report: MergeReport | None = None
    """What the last merge into a quantised base lost; None where there was none."""

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | None = None,
        adapter_name: str | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__(replication.replicated(model, _replication(peft_config)))
        if peft_config is not None:
            try:
                name = _name_for(peft_config, adapter_name)
                self._add(name, peft_config, half=not autocast_adapter_dtype)
            except BaseException:
                self._end()
                raise
            self.set_adapter(name)

    @property
    def base_model(self) -> BaseModel:
        """The base's attributes with the view's verbs, for the field's `model.base_model.set_adapter([...])`."""
        return BaseModel(self)

    # ---- attaching and taking away -----------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Attaches a new adapter. What is active and what trains stay as they are.

        Args:
            low_cpu_mem_usage: taken as in the field; parameters are made on their device at once either way.

        Raises:
            ValueError: the name is taken or cannot be one, or the configuration does not fit the model.
        """
        self._add(_name_for(peft_config, adapter_name), peft_config, half=not autocast_adapter_dtype)

    def _check_new(self, name: str) -> None:
        check_name(name)
        if name in self._names:
            raise ValueError(
                f"There is an adapter {name!r} already. Pick another name, or delete_adapter({name!r}) first."
            )
        if self._merged is not None:
            raise RuntimeError("Adapters are merged into the base; unmerge_adapter() before another one is attached.")

    def _add(self, name: str, config: PeftConfig, half: bool) -> None:
        self._check_new(name)
        source = None if config.init_from is None else self.get_adapter(config.init_from)
        if isinstance(config, LoraConfig):
            replication.check(self.base, config.layer_replication)
        where = config.base_model_name_or_path or getattr(self.base, "name_or_path", None) or None
        adapter = build(name, config, self.base, half)
        adapter.config = replace_options(adapter.config, base_model_name_or_path=where)
        if source is not None:
            start_from(adapter, source)
        self._install(adapter)

    def delete_adapter(self, adapter_name: str) -> None:
        """Takes an adapter away; a composition that uses it goes on without it.

        Raises:
            ValueError: a router that is active chooses it. Nothing was changed.
            RuntimeError: adapters are merged into the base.
        """
        self.get_adapter(adapter_name)
        if self._merged is not None:
            raise RuntimeError("Adapters are merged into the base; unmerge_adapter() before one is deleted.")
        left = composition.without(self._node, adapter_name)
        self._take_away(adapter_name)
        self.set_adapter(left)

    def unload(self) -> nn.Module:
        """Takes all adapters away and gives the base back, to the bit as it was (what is merged is taken out first)."""
        if self._merged is not None:
            self.unmerge_adapter()
        return self._end()

    def set_adapter(self, adapter_name: Any) -> None:
        """Makes a composition active: a name, a list (their sum), a text ("task + 0.5*style", "a >> b"), Seq or Sum.

        "learned*a + b" and "token_router(a, b)" make new gates, unless the same text is active already. What trains
        stays as it is: see `freeze`, `unfreeze`, `trainable`.
        """
        node = self.checked(adapter_name, new=True)
        if self._merged is not None and composition.key(node) != composition.key(self._merged.node):
            raise RuntimeError(
                f"{self._merged.node!r} is merged into the base; unmerge_adapter() before another is made active."
            )
        self._node = node
        self.gates = nn.ModuleList(composition.trained_gates(node)).train(self.training)

    # ---- combining ---------------------------------------------------------------------------------------------------

    def combine(
        self,
        composition: Any,
        how: str | None = None,
        *,
        adapter_name: str,
        r: Any = None,
        density: float | None = None,
        majority_sign: str | None = None,
        seed: int | None = None,
    ) -> Report:
        """Makes one new adapter that stands for a composition: "0.5*a + 0.5*b", "a - b", "-1*a", "prefix1 >> prefix2".

        It is attached frozen and not made active; the others stay as they are. docs/combining.md has every way.

        Args:
            composition: as in `set_adapter`.
            how: "cat", "svd", "linear", "mean", "ties", "dare_linear", "dare_ties", "magnitude_prune", "ab_linear".
                None: the one that is exact.
            adapter_name: of the new adapter.
            r: rank of the result, at most; "full" for as much as it takes to be exact; a share, as 0.99, for the least
                rank at each site that keeps so much of the change.
            density: share of the numbers of each change that TIES, DARE and pruning keep, in (0, 1].
            majority_sign: of TIES: "total" (the sum's; the default) or "frequency".
            seed: of what DARE drops; 0 if left out.

        Returns:
            How, with which rank and how far from the composition itself, site by site. It prints as a table.

        Raises:
            ValueError: the name is taken, no way is exact and none is named, or an option is missing or has no effect.
            TypeError: no one adapter can stand for these. Nothing was changed.
            RuntimeError: adapters are merged into the base.
        """
        options = Options(r=r, density=density, majority_sign=majority_sign, seed=seed)
        return self._combine(self.checked(composition), how, adapter_name, options)

    def _combine(self, node: Node, how: str | None, name: str, options: Options) -> Report:
        self._check_new(name)
        if self._record.merged_by is not None:
            raise RuntimeError("Another view has merged its adapters into this base; unmerge_adapter() there first.")
        adapter, report = combine(self.base, self._names, node, how, name, options)
        self._install(adapter)
        return report

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> Report:
        """`combine` by the field's name for it. Every type but "cat" works on W' - W, never on A and B apart.

        Args:
            svd_rank: of the types that end in "svd"; the largest rank of the adapters if left out, and of the others.
            svd_full_matrices: taken as in the field; the result is the same either way.

        Raises:
            ValueError: as `combine`; or `svd_clamp` or `svd_driver`, which are not there.
        """
        for name in adapters:
            self.get_adapter(name)
        if svd_clamp is not None or svd_driver is not None:
            raise ValueError(
                "svd_clamp and svd_driver have no effect here: the best approximation is kept as it is. Leave them out."
            )
        seed = int(torch.randint(2**31, ())) if combination_type.startswith("dare") else 0
        node, how, options = translated(
            adapters, weights, self._names, combination_type, svd_rank, density, majority_sign_method, seed
        )
        return self._combine(node, how, adapter_name, options)

    # ---- what trains -------------------------------------------------------------------------------------------------

    def freeze(self, *adapter_names: str) -> None:
        """These adapters (all, if none is named) get no gradients from now on. "gates" names the trained gates."""
        for name in adapter_names or self._names:
            self._member(name).requires_grad_(False)

    def unfreeze(self, *adapter_names: str) -> None:
        """These adapters (all, if none is named) get gradients from now on. "gates" names the trained gates."""
        for name in adapter_names or self._names:
            self._member(name).requires_grad_(True)

    def _member(self, name: str) -> nn.Module:
        """An adapter, or what "gates" stands for. Raises ValueError where there is none."""
        if name != "gates":
            return self.get_adapter(name)
        if not len(self.gates):
            raise ValueError(f"There are no trained gates in {self._node!r}; learned*a or token_router(a, b) has them.")
        return self.gates

    def trainable(self, *adapter_names: str) -> list[str]:
        """The adapters that train; given names, exactly those train from now on."""
        if adapter_names:
            for name in adapter_names:
                self.get_adapter(name)
            for name, adapter in self._names.items():
                adapter.requires_grad_(name in adapter_names)
        return [name for name, adapter in self._names.items() if any(p.requires_grad for p in adapter.parameters())]

    def param_groups(self, options: Mapping[str, float | Mapping[str, Any]] | None = None) -> list[dict[str, Any]]:
        """One optimiser group for each adapter that trains (two, with LoRA+), and one for learned gates.

        `torch.optim.AdamW(model.param_groups({"lora": 2e-4, "task": 5e-3}))`. Learning rates are remembered, saved with
        the adapters, and used where none is given.

        Args:
            options: adapter name -> learning rate, or a dict of the optimiser's options. "gates" names the gates.
                `loraplus_lr_ratio` among them: how many times as fast as A a LoRA's B learns (LoRA+, arXiv:2402.12354;
                not at embeddings).

        Raises:
            ValueError: a name that is no adapter, one that does not train, or a ratio where there is no LoRA.
        """
        given = {n: o if isinstance(o, Mapping) else {"lr": o} for n, o in (options or {}).items()}
        for name in given:
            if not any(p.requires_grad for p in self._member(name).parameters()):
                raise ValueError(
                    f"param_groups: {name!r} has nothing that trains, so its options would have no effect. "
                    f"Call unfreeze({name!r})."
                )
        remembered = {n: {"lr": a.learning_rate} for n, a in self._names.items() if a.learning_rate is not None}
        members = {"gates": self.gates, **self._names}
        groups = param_groups(members, {n: {**remembered.get(n, {}), **given.get(n, {})} for n in members})
        for name, adapter in self._names.items():
            adapter.learning_rate = given.get(name, {}).get("lr", adapter.learning_rate)
        return groups

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(parameters that train, all parameters)"""
        return sum(p.numel() for p in self.parameters() if p.requires_grad), count(self)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """What is attached at each place, active, merged, trained, and where its tensors are."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The same of the model as a whole."""
        return get_model_status(self)

    def verify(self, batch: Any, loss: Callable[[Any], Tensor] | None = None, merge: bool = True) -> Proof:
        """Proves by one tiny step on `batch` that every adapter trains, and puts everything back.

        Per adapter: it changes the output, gets a gradient, is changed by a step. Of all: nothing frozen changes;
        disabled it is the base; merged, and saved and loaded, it gives the same. `print` what this returns; it is
        true where nothing failed.

        Args:
            batch: keyword arguments of the model, or its first argument; with labels for a real loss.
            loss: (output) -> scalar, where the output has no `loss` of its own.
            merge: try merging too, which needs room for the merged weights.
        """
        return verify(self, batch, loss, merge)

    check = verify

    def print_trainable_parameters(self) -> None:
        """Prints both numbers and their ratio."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    # ---- merging -----------------------------------------------------------------------------------------------------

    def merge_adapter(
        self,
        adapter_names: Any = None,
        safe_merge: bool = True,
        keep_original: bool = True,
        into: str | None = None,
    ) -> MergeReport | None:
        """Puts a composition (the active one) into the base's weights. Prompts and prefixes stay beside them.

        Args:
            adapter_names: what to merge, as in `set_adapter`; it becomes the active composition.
            safe_merge: taken as in the field; results are checked to be finite before anything is written either way.
            keep_original: keep the base's own weights (on the CPU; quantised ones where they are) for an exact
                `unmerge_adapter`.
            into: of a quantised base only. "dequantised" (the default): what is adapted becomes layers of floats, which
                hold the change but for their rounding. "quantised": it is quantised anew, which loses part of it.

        Returns:
            Of a quantised base what is lost, the one way and the other; it prints as such. None where it is floats.

        Raises:
            RuntimeError: something is merged already, or another view is in a call.
            TypeError, ValueError: the composition cannot be merged, or `into` has no effect; nothing was changed.
        """
        _ = self._record.fingerprint  # of the base as it is before, for adapters that are saved meanwhile
        return self._merge(adapter_names, keep_original, into)

    def _merge(self, adapter_names: Any, keep_original: bool, into: str | None) -> MergeReport | None:
        record = self._record
        with record.lock:
            if record.merged_by is not None:
                raise RuntimeError("Adapters are merged into this base already; unmerge_adapter() first.")
            if busy := [view for view in record.running if record.running[view] > 0]:
                raise RuntimeError(f"{len(busy)} view of this base is in a call right now; merge when it is done.")
            node = self.composition if adapter_names is None else self.checked(adapter_names)
            self._merged = merging.merge(self.base, self._names, node, keep_original, into)
            record.merged_by = id(self)
            self._plans.clear()
            self.set_adapter(node)
            self.merge_report = self._merged.report
            return self.merge_report

    def unmerge_adapter(self) -> None:
        """Puts the base's own weights back, bit for bit.

        Raises:
            RuntimeError: nothing is merged, or the originals were given up.
        """
        if self._merged is None:
            raise RuntimeError("Nothing is merged.")
        if not self._merged.kept:
            raise RuntimeError(
                "merge_adapter(keep_original=False) gave the base's own weights up; they cannot be put back."
            )
        merging.unmerge(self._merged)
        self._merged, self._record.merged_by = None, None
        self._plans.clear()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: Any = None,
        into: str | None = None,
    ) -> nn.Module:
        """Merges a composition for good and gives the base back, without adapters.

        Args:
            into: as in `merge_adapter`. Into the dequantised base (the default) all of it becomes a plain model of
                floats, also what is not adapted; into the quantised one it stays what it was.

        Raises:
            TypeError: part of it is no change of weights (a prompt, a prefix, a bottleneck): it would be lost.
            ValueError: something is merged already, and `into` says otherwise.
        """
        if self._merged is None:
            node = self.composition if adapter_names is None else self.checked(adapter_names)
            merging.refuse_beside(self._names, node)
            self._merge(node, False, into)
        elif into is not None and (self._merged.report is None or self._merged.report.into != into):
            raise ValueError(f"into={into!r} comes too late: it is merged already. Call unmerge_adapter() first.")
        if self._merged is not None and self._merged.new_biases:
            merging.warn_of_new_biases(self.base, self._merged.new_biases)
        merging.untie(self.base)
        if self._merged is not None and self._merged.report is not None and self._merged.report.into == "dequantised":
            dequantise(self.base)
        replication.separate(self.base)
        self._merged = None
        return self._end()

    # ---- files -------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
    ) -> None:
        """Writes the adapters: one that is called "default" into the folder itself, others into sub-folders by name.

        With several, or another composition than one adapter alone, `composition.json` says what is active.

        Args:
            save_embedding_layers: write the base's embeddings, too: "auto" where its vocabulary was resized since it
                was loaded and the adapter does not train the new rows itself.

        Raises:
            ValueError: `safe_serialization=False` (pickles are not written), or an option that would have no effect.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False asks for a pickle; coadapt writes safetensors only.")
        if save_embedding_layers not in ("auto", False, True):
            raise ValueError(f"save_embedding_layers={save_embedding_layers!r} is not one of 'auto', True, False.")
        if not is_main_process:
            return
        chosen = list(selected_adapters or self._names)
        adapters = {name: self.get_adapter(name) for name in chosen}
        active = set(composition.names(self._node))
        whole = active <= set(chosen) and (active or selected_adapters is None)
        node = self._node if whole else composition.Sum(*chosen)
        folder.save(Path(save_directory), adapters, node, self.base, self._record.fingerprint, save_embedding_layers)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "Adapters",
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        base_model: str | None = None,
    ) -> str:
        """Puts the adapters on a hub, as `save_pretrained` writes them, in one commit; its address.

        There is no card: `coadapt push` sends a folder with one.

        Args:
            repo_id: USER/NAME; made where it is not there.
            private: of a repository that is made.
            token: in place of the one that the hub's own login left, or HF_TOKEN.
            revision: a branch; made where it is not there.
            base_model: the base on the hub, where it was loaded from a path of this machine.

        Raises:
            ValueError: nobody else could load it, the name is taken, the token may not, or nobody answers.
        """
        from .formats import hub  # importing it takes a third of a second, and few need it

        hub.check_name(repo_id)
        hub.ready_to_send(token)
        with tempfile.TemporaryDirectory() as place:
            self.save_pretrained(place)
            package = pack(Path(place), base_model)
            return hub.send(package, repo_id, message=commit_message, private=private, revision=revision, token=token)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str | None = None,
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        subfolder: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """A view of `model` with what a folder holds: one adapter, a composition, or a Trainer's checkpoint.

        Args:
            model: the base, or a view, to which the adapters are added.
            model_id: the folder; or, where there is none of that name, a repository of the hub, USER/NAME. Of it only
                what belongs to adapters is fetched, never pickles.
            adapter_name: for a folder with one adapter; "default" if left out.
            is_trainable: attach it to be trained on; frozen, and in evaluation mode, otherwise.
            revision: of the repository.

        Raises:
            FileNotFoundError, ValueError: no adapter there, one for another model, or tensors missing, left over or of
                other shapes (all are listed). Nothing is attached then.
        """
        unused = {k: v for k, v in kwargs.items() if k != "low_cpu_mem_usage" and v}
        if unused:
            raise TypeError(f"from_pretrained has no option {', '.join(unused)}.")
        where = place_of(model_id, revision) / (subfolder or "")
        asked = folder.replication_in(where) if config is None else _replication(config)
        view = model if isinstance(model, PeftModel) else cls(replication.replicated(model, asked))
        try:
            node = view._load(where, adapter_name, is_trainable, config, half=not autocast_adapter_dtype)
        except BaseException:
            if view is not model:
                view._end()
            raise
        view.set_adapter(node)
        if not is_trainable:
            view.eval()
        return view  # type: ignore[return-value]

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> None:
        """Attaches an adapter from its folder, or the hub. What is active stays as it is.

        Raises as `from_pretrained`.
        """
        if unused := {k for k, v in kwargs.items() if k != "low_cpu_mem_usage" and v}:
            raise TypeError(f"load_adapter has no option {', '.join(unused)}.")
        where = place_of(model_id)
        self._load(where, adapter_name, is_trainable, None, half=not autocast_adapter_dtype)

    def _load(self, where: Path, name: str | None, is_trainable: bool, config: PeftConfig | None, half: bool) -> Node:
        found = self.read(where, name, is_trainable, config, half)
        self.take_in(found)
        return found.node

    def read(
        self,
        where: Path,
        name: str | None = None,
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        half: bool = False,
    ) -> folder.Loaded:
        """What a folder holds, built for this base and attached to nothing: on any thread, beside calls. For `take_in`.

        Raises as `from_pretrained`.
        """
        if config is None and (asked := folder.replication_in(where)) is not None:
            replication.check(self.base, asked)
        return folder.load(where, self.base, self._record.fingerprint, name, config, is_trainable, half)

    def take_in(self, found: folder.Loaded) -> None:
        """Attaches what `read` gave. What is active stays as it is.

        Raises:
            ValueError: there is an adapter of one of the names already. Nothing is attached then.
        """
        for adapter in found.adapters:
            if adapter.name in self._names:
                raise ValueError(f"There is an adapter {adapter.name!r} already; load it under another adapter_name.")
        for adapter in found.adapters:
            self._install(adapter)

    def get_extra_state(self) -> Tensor:
        """Configurations, composition and fingerprint, as JSON in a uint8 tensor."""
        return checkpoint.describe(self._names, self._node, self._record.fingerprint)

    def set_extra_state(self, state: Tensor) -> None:
        """Checks that the state is of a view like this one. Raises ValueError where it is not."""
        checkpoint.compare(state, self._names)


def _mixed_by_xlora(model: nn.Module, config: XLoraConfig, autocast: bool) -> PeftModel:
    view = model if isinstance(model, PeftModel) else PeftModel(model)
    for name, where in config.names().items():
        view.load_adapter(where, name, config.use_trainable_adapters, autocast_adapter_dtype=autocast)
    view.set_adapter(composition.Sum(*config.names(), weights=config.router()))
    return view


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str | None = None,
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """A view of `model` with one adapter; given a view, that view with the adapter added to what is active.

    >>> base = nn.Sequential(nn.Linear(4, 4))
    >>> model = get_peft_model(base, LoraConfig(target_modules=["0"]), "style")
    >>> model.active_adapters, model.trainable("style")
    (['style'], ['style'])

    Args:
        adapter_name: left out, the configuration's own name or "default" (or, where that is taken, the method's name).
        mixed: taken as in the field; every view can mix methods.
        low_cpu_mem_usage: taken as in the field; parameters are made on their device at once either way.

    Raises:
        TypeError, ValueError: the configuration or its name does not fit; nothing was changed.
    """
    if isinstance(peft_config, XLoraConfig):
        return _mixed_by_xlora(model, peft_config, autocast_adapter_dtype)
    if revision is not None:
        peft_config = replace_options(peft_config, revision=revision)
    if not isinstance(model, PeftModel):
        return PeftModel(model, peft_config, adapter_name, autocast_adapter_dtype)
    name = _name_for(peft_config, adapter_name)
    if adapter_name is None and peft_config.adapter_name is None and name in model.peft_config:
        kind = str(peft_config.peft_type).lower()
        tried = [kind, *(f"{kind}_{i}" for i in range(2, 1000))]
        name = next(n for n in tried if n not in model.peft_config)
    model.add_adapter(name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
    active = model.composition
    model.set_adapter(composition.Sum(active, name) if composition.names(active) else name)
    return model


def _replication(config: PeftConfig | None) -> replication.Map | None:
    return config.layer_replication if isinstance(config, LoraConfig) else None


def _name_for(config: PeftConfig, given: str | None) -> str:
    method_for(config)  # refuses what is no configuration of ours
    own = config.adapter_name
    if own is not None and given is not None and own != given:
        raise ValueError(f"The configuration names its adapter {own!r}, the call {given!r}. Give one name.")
    name = own if given is None else given
    return "default" if name is None else name
