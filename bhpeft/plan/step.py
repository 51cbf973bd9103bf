"""What one micro-step allocates and computes: the real model and loss, run on tensors that have shapes and no numbers.

torch's fake tensors go through the same operators, dispatch (autocast, fused attention) and autograd as real ones, and
every storage that an operator makes is counted while it lives. So the peak is that of the real step's tensors, whatever
the architecture, the adapter, or checkpointing, without a formula for any of them. Not counted is what kernels use
inside, and what an allocator wastes between tensors.

A stack of equal layers is run at two small depths and extended in proportion, for the peak and the operations are
linear in depth. So they are in rows: what lives at any moment is, and of two batches that are fullest at the same one
all between are fullest there too (the most of linear functions is convex), so that these are not run.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from dataclasses import astuple, dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PretrainedConfig

from bhpeft.adapters.bh_peft import gaussian_layers, kl_divergence, kl_gradient_norm
from bhpeft.labelled_logits import last_block_at
from bhpeft.plan.model import Question

TRAIN_DEPTHS, PREDICT_DEPTHS = (1, 2), (2, 3)  # numbers of layers that are really run where a model has more
FEW = 2  # rows: one alone goes other ways, for what is as wide as 1 is spread in place of copied


@dataclass(frozen=True)
class StepCost:
    """Of one micro-step, or of one forward pass.

    Attributes:
        peak: bytes of all tensors beyond weights and gradients, where they are most.
        logits: those among them, at that moment, that are as wide as the vocabulary.
        flops: floating-point operations of matrix products, 2 a multiplication with addition.
    """

    peak: int
    logits: int
    flops: int


class _Counter(TorchDispatchMode):
    """Counts bytes of living storages and operations; what `known` holds is not counted."""

    def __init__(self, known: list[torch.Tensor], vocabulary: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.living = self.living_logits = self.flops = 0
        self.peak = self.peak_logits = self.peak_at = 0
        self.operations = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor)
        return out

    @property
    def when(self) -> tuple[int, int]:
        """The operation at which most lived, of how many."""
        return self.peak_at, self.operations

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        logits = size if tensor.dim() and self.vocabulary in tensor.shape[-2:] else 0
        self.living += size
        self.living_logits += logits
        weakref.finalize(storage, self._free, size, logits)
        if self.living > self.peak:
            self.peak, self.peak_logits, self.peak_at = self.living, self.living_logits, self.operations

    def _free(self, size: int, logits: int) -> None:
        self.living -= size
        self.living_logits -= logits


class FakeStep:
    """Micro-steps of a model on the meta device, at any batch; the model is taken over and changed.

    Args:
        model: as of `meta_model`; of `shallow(config)`, where only its steps are wanted.
        config: of the whole model.
        length: tokens of a row.
        compiled: whether the run compiles the model, which is then computed as a whole.
    """

    def __init__(
        self, model: nn.Module, config: PretrainedConfig, question: Question, length: int, compiled: bool = False
    ):
        self.model, self.config, self.question, self.length = model, config, question, length
        self.compiled = compiled
        self.layers = layer_list(model)
        self.depth = config.num_hidden_layers
        self.dtype = next(p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point())
        # A model without a stack of equal layers is run whole.
        self.whole = self.layers is None or self.depth <= max(PREDICT_DEPTHS)
        self._found: dict[tuple, dict[int, tuple[StepCost, list]]] = {}  # by kind of step, then by rows; when fullest
        self._fake = FakeTensorMode()
        if not self.whole:
            del self.layers[max(PREDICT_DEPTHS) :]
        with self._fake:
            _materialise(model)

    def train(self, rows: int, checkpointing: bool = False, autocast: bool = False) -> StepCost:
        """One forward and backward pass over `rows` rows of full length, in training.

        Args:
            autocast: as the Trainer has it in half precision without DeepSpeed; with DeepSpeed nothing is cast.
        """
        return self._cost(TRAIN_DEPTHS, self._train, rows, checkpointing, autocast)

    def predict(self, rows: int, samples: int = 0, autocast: bool = False) -> StepCost:
        """One forward pass without gradient over `rows` rows, each under `samples` posterior samples."""
        return self._cost(PREDICT_DEPTHS, self._predict, rows, samples, autocast)

    def _cost(self, depths: tuple[int, int], run, rows: int, *how) -> StepCost:
        known = self._found.setdefault((run.__name__, *how), {})
        if rows not in known and FEW < rows < max(known, default=0) and FEW not in known:
            known[FEW] = self._at_depths(depths, run, FEW, *how)
        if rows not in known and (between := _interpolated(known, rows)):
            return between
        if rows not in known:
            known[rows] = self._at_depths(depths, run, rows, *how)
        return known[rows][0]

    def _at_depths(self, depths: tuple[int, int], run, *how) -> tuple[StepCost, list]:
        if self.whole:
            cost, when = run(*how)
            return cost, [when]
        stack, found = list(self.layers), []
        for depth in depths:
            del self.layers[:]
            self.layers.extend(stack[:depth])
            found.append(run(*how))
        del self.layers[:]
        self.layers.extend(stack)
        (low, _), (high, _) = found
        more = self.depth - depths[1]
        cost = StepCost(
            high.peak + more * (high.peak - low.peak), high.logits, high.flops + more * (high.flops - low.flops)
        )
        return cost, [when for _, when in found]

    def _train(self, rows: int, checkpointing: bool, autocast: bool) -> tuple[StepCost, tuple]:
        self.model.train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 renames both; the new names are newer
            if checkpointing:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
            elif checkpointing != self.model.is_gradient_checkpointing:
                self.model.gradient_checkpointing_disable()
                self.model.disable_input_require_grads()  # which enabling it asks for, of an adapted model
        with self._fake:
            trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            for parameter in trainable:
                parameter.grad = torch.zeros_like(parameter)
            batch = self._batch(rows)
            gradients = [parameter.grad for parameter in trainable]
            with self._counter(gradients) as counter:
                with self._cast(autocast), self._short_block(batch):
                    loss = self.model(**batch).loss
                kl = kl_divergence(gaussian_layers(self.model))
                if kl is not None:
                    loss = loss + kl * 1e-3
                    kl_gradient_norm(gaussian_layers(self.model))
                loss.backward()
                del loss, kl
        return StepCost(counter.peak, counter.peak_logits, counter.flops), counter.when

    @torch.no_grad()
    def _predict(self, rows: int, samples: int, autocast: bool) -> tuple[StepCost, tuple]:
        self.model.eval()
        with self._fake:
            layers = gaussian_layers(self.model) if samples else []
            for layer in layers:
                layer.eps = torch.empty(samples, layer.out_features, layer.in_features)
            batch = self._batch(rows * max(1, samples))
            batch.pop("labels")
            batch.pop("shift_labels", None)
            with self._counter([]) as counter, self._cast(autocast):
                self.model(**batch)
            noise = sum(layer.eps.numel() * 4 for layer in layers)
            for layer in layers:
                layer.eps = None
        return StepCost(counter.peak + noise, counter.peak_logits, counter.flops), counter.when

    def _counter(self, known: list[torch.Tensor]) -> _Counter:
        known = [*self.model.parameters(), *self.model.buffers(), *known]
        return _Counter(known, getattr(self.config, "vocab_size", -1))

    def _cast(self, on: bool):
        half = torch.bfloat16 if self.dtype == torch.float16 else self.dtype  # as wide, and CPUs autocast to it
        return torch.autocast("cpu", half) if on and half != torch.float32 else contextlib.nullcontext()

    def _short_block(self, batch: dict[str, torch.Tensor]):
        """As `labelled_alone` has it in training; its output matrix is taken to multiply all of `logits_to_keep`."""
        places = batch.get("logits_to_keep")
        if places is None or self.compiled or 2 * len(places) > self.length:
            return contextlib.nullcontext()
        return last_block_at(self.model.get_base_model(), places.expand(len(batch["labels"]), -1))

    def _batch(self, rows: int) -> dict[str, torch.Tensor]:
        choices = (self.question.labels,) if self.question.head == "multiple_choice" else ()
        ids = torch.zeros(rows, *choices, self.length, dtype=torch.long)
        if self.question.head == "lm":
            labels = ids.clone()
        else:
            labels = torch.zeros(rows, dtype=torch.float if self.question.head == "regression" else torch.long)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        if self.question.head == "lm":
            batch["use_cache"] = False
        if self.question.labelled:  # as `at_labels` makes them
            batch["logits_to_keep"] = torch.arange(-self.question.labelled, 0)
            batch["shift_labels"] = labels[:, -self.question.labelled :].contiguous()
        return batch


def _interpolated(known: dict[int, tuple[StepCost, list]], rows: int) -> StepCost | None:
    """The cost between two numbers of rows whose steps are the same operations, fullest at the same ones; else None."""
    low = max((n for n in known if n < rows), default=None)
    high = min((n for n in known if n > rows), default=None)
    if low is None or high is None or known[low][1] != known[high][1]:
        return None
    ends = (astuple(known[low][0]), astuple(known[high][0]))
    return StepCost(*(a + (b - a) * (rows - low) // (high - low) for a, b in zip(*ends, strict=True)))


def shallow(config: PretrainedConfig) -> PretrainedConfig:
    """The same model with no more layers than are run here."""
    depth = min(config.num_hidden_layers, max(PREDICT_DEPTHS))
    cut = type(config).from_dict(config.to_dict())
    if getattr(cut, "layer_types", None):
        cut.layer_types = cut.layer_types[:depth]
    cut.num_hidden_layers = depth
    return cut


def layer_list(model: nn.Module) -> nn.ModuleList | None:
    """The stack of a model's layers: its list of most weights, or None where they are not of one class."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=None)
    return None if found is None or len({type(layer) for layer in found}) != 1 else found


def _materialise(model: nn.Module) -> None:
    """Replace meta tensors by fake ones on the CPU; tied weights stay tied."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = new
                tensors[name] = made[id(tensor)]
    tokens = getattr(model, "prompt_tokens", {})  # of peft's prompts, no buffers
    for name, tensor in tokens.items():
        tokens[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
