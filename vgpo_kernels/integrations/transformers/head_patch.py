"""Replaces the product of a model's output head during a forward, and finds what the model does with its logits.

model(**batch)
  decoder                      hidden states (B, n, D)
  head(hidden)                 called as a module: DeepSpeed ZeRO-3, FSDP and DDP run their hooks, gather its weight
    HeadPatch._forward           in place of hidden @ weight.T: compute(head, hidden) gives `results`, by name
    HeadPatch._emit_probe        last forward hook: keeps the results and returns the probe, (1, 1, V) known values
  logits = f(probe)            f is what the model does with its logits: a scale, a soft-cap, or nothing
HeadPatch.run                  compares f(probe) with each LogitTransform that the configuration may mean; if the
                               one that `results` were computed with is another, the model runs once more

In the backward of a result, _Tie passes the gradient on to `results`, and from there to head and hidden states. It
also gives the logits a gradient of zeros, which ends at _Probe: wrappers see a backward through the model's output.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vgpo_kernels.integrations.transformers.model_parts import find_decoder, is_encoder_decoder, outermost_model

# Fields of configurations that scale logits; DIVIDING are those that most likely divide them.
SCALE_FIELDS = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")
SOFTCAP_FIELDS = ("final_logit_softcapping",)
DIVIDING = ("logits_scaling",)
# The values of a probe are the whole numbers from -PROBE to PROBE, over and over.
PROBE = 50

# The transform that the first forward of a head's model has shown, so that later patches need not find it again.
_VERIFIED: WeakKeyDictionary[nn.Module, "LogitTransform"] = WeakKeyDictionary()

Compute = Callable[[nn.Linear, Tensor], dict[str, Tensor]]


class LogitTransform(NamedTuple):
    """What a model does with the logits x of its head: softcap * tanh(scale * x / softcap)."""

    scale: float
    softcap: float | None

    def __call__(self, logits: Tensor) -> Tensor:
        """Returns what the model makes of `logits`."""
        scaled = logits * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def fold(self, temperature: float) -> tuple[float, float | None]:
        """Returns the temperature and soft-cap of the logits before it that are equal to `temperature` afterwards."""
        return temperature / self.scale, None if self.softcap is None else self.softcap / self.scale


class Head(NamedTuple):
    """A model's output head, and what surrounds it.

    Args:
        name: of the model's class, for errors.
        module: the head.
        decoder: gives the states that the head gets, as its last_hidden_state.
        transforms: what the model may do with logits by its configuration, the most likely first.
        accepts: the arguments of the model's forward.
    """

    name: str
    module: nn.Linear
    decoder: nn.Module
    transforms: tuple[LogitTransform, ...]
    accepts: frozenset[str]


def find_head(model: nn.Module) -> Head:
    """Returns the output head of a model of transformers, however it is wrapped.

    Raises:
        TypeError: no model of transformers is inside, or its head is no plain linear layer.
        ValueError: the model has no head, or more than a decoder.
        RuntimeError: the head is patched already.
    """
    inside = outermost_model(model)
    name = type(inside).__name__
    if is_encoder_decoder(inside.config):
        raise ValueError(f"{name}: expected a decoder of prompt and completion together, got an encoder-decoder")
    head = _trained_copy(_output_embeddings(inside))
    if head is None:
        raise ValueError(f"{name}: expected a model with an output head (get_output_embeddings), got none")
    kind = type(head)
    if not isinstance(head, nn.Linear) or kind.forward is not nn.Linear.forward:
        raise TypeError(
            f"{name}: expected a plain torch.nn.Linear as output head, got {kind.__module__}.{kind.__qualname__}; "
            "leave the head out of adapters and of quantisation (PEFT's modules_to_save=['lm_head'] trains it whole), "
            "or merge its adapter"
        )
    if head.weight.is_meta:
        raise ValueError(f"{name}: expected an output head with weights, got meta tensors; load the weights first")
    if "forward" in vars(head):
        raise RuntimeError(f"{name}: the forward of its output head has been replaced already, by {_owner(head)}")
    parameters = inspect.signature(inside.forward).parameters
    accepts = set(parameters)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        accepts.add("use_cache")  # handed on to the decoder
    return Head(name, head, find_decoder(inside), _transforms(inside.config), frozenset(accepts))


def _output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """Returns a model's head, that of its decoder if the whole has none (Nemotron 3 Omni)."""
    head = model.get_output_embeddings()
    decoder = model.get_decoder()
    return decoder.get_output_embeddings() if head is None and isinstance(decoder, PreTrainedModel) else head


def _trained_copy(head: Any) -> Any:
    """Returns the linear layer that runs if PEFT keeps a copy of the head to train (`modules_to_save`)."""
    copies = getattr(head, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return head
    active = [name for name in head.active_adapters if name in copies]
    return copies[active[0]] if active and not head.disable_adapters else head.original_module


def _owner(head: nn.Module) -> str:
    forward = vars(head)["forward"]
    return "fused_logprobs" if isinstance(getattr(forward, "__self__", None), HeadPatch) else repr(forward)


def _transforms(config: Any) -> tuple[LogitTransform, ...]:
    """Returns what the fields of a configuration may mean; a model may also ignore them."""
    configs = (config, config.get_text_config())
    scales, softcaps = [], list(_numbers(configs, SOFTCAP_FIELDS))
    for field in SCALE_FIELDS:
        for value in _numbers(configs, (field,)):
            scales += [1.0 / value, value] if field in DIVIDING else [value, 1.0 / value]
    found = [LogitTransform(scale, softcap) for softcap in (*softcaps, None) for scale in (*scales, 1.0)]
    return tuple(dict.fromkeys(found))


def _numbers(configs: tuple[Any, ...], fields: tuple[str, ...]) -> Iterator[float]:
    for field in fields:
        for config in configs:
            value = getattr(config, field, None)
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                yield float(value)


class HeadPatch:
    """Replaces the forward of a head while it is entered; see the module's docstring.

    Args:
        head: the head.
    """

    def __init__(self, head: Head) -> None:
        self.head = head
        verified = _VERIFIED.get(head.module)
        self.transform = verified if verified in head.transforms else head.transforms[0]
        self._is_verified = self.transform is verified
        self._compute: Compute | None = None
        self._results: dict[str, Tensor] | None = None
        self._probe: Tensor | None = None
        self._hook: Any = None

    def __enter__(self) -> "HeadPatch":
        module = self.head.module
        module.forward = self._forward  # type: ignore[assignment]
        # Registered last: the hooks of wrappers have run on the results before.
        self._hook = module.register_forward_hook(self._emit_probe)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        del self.head.module.forward
        self._probe = self._hook = None

    def run(self, forward: Callable[[], Any], compute: Compute) -> dict[str, Tensor]:
        """Calls `forward`, which runs the model, and returns what `compute` makes of the states that the head gets.

        If the first forward shows another transform of the logits than the one assumed, it is called again.

        Raises:
            RuntimeError: the model does not call its head, or more than once; or the `with` has ended.
            ValueError: the model changes logits in another way than its configuration says.
        """
        if self._hook is None:
            raise RuntimeError(f"{self.head.name}: its output head is replaced only inside fused_logprobs")
        self._compute, self._results = compute, None
        try:
            logits = self._logits_of(forward())
        finally:
            self._compute, results, self._results = None, self._results, None
        if results is None:
            raise RuntimeError(f"{self.head.name}: its forward has not called its output head")
        if not self._is_verified:
            assumed, self.transform = self.transform, self._read(logits.detach())
            self._is_verified, _VERIFIED[self.head.module] = True, self.transform
            if self.transform != assumed:
                del results, logits
                return self.run(forward, compute)
        return _tied(results, logits)

    def _forward(self, hidden: Tensor) -> dict[str, Tensor]:
        if self._compute is None:
            raise RuntimeError(
                f"{self.head.name}: its output head was called inside fused_logprobs, which replaces it; leave the "
                "`with` before anything else (such as generate) runs the model"
            )
        compute, self._compute = self._compute, None
        return compute(self.head.module, hidden)

    def _emit_probe(self, module: nn.Module, args: tuple[Any, ...], results: dict[str, Tensor]) -> Tensor:  # noqa: ARG002
        self._results = results
        if self._probe is None or self._probe.device != args[0].device:
            positions = torch.arange(self.head.module.out_features, device=args[0].device)
            self._probe = (positions % (2 * PROBE + 1) - PROBE).float()[None, None]  # [1, 1, V]
        # Without a gradient the function has nothing to connect, and torch.compile would not trace it rightly.
        if not any(value.requires_grad for value in results.values()):
            return self._probe.clone()
        probe: Tensor = _Probe.apply(self._probe, *results.values())
        return probe

    def _logits_of(self, output: Any) -> Tensor:
        logits = getattr(output, "logits", None)
        if logits is None and isinstance(output, tuple):
            logits = output[0]
        if not isinstance(logits, Tensor):
            raise TypeError(f"{self.head.name}: expected an output with logits, got {type(output).__name__}")
        return logits

    def _read(self, logits: Tensor) -> LogitTransform:
        """Returns the transform that makes these logits of the probe."""
        probe: Tensor = self._probe  # type: ignore[assignment]
        tolerance = 8 * torch.finfo(logits.dtype).eps
        if logits.shape == probe.shape:
            for transform in self.head.transforms:
                expected = transform(probe)
                if bool(((logits.float() - expected).abs() <= tolerance * expected.abs().clamp(min=1.0)).all()):
                    return transform
        fields = ", ".join((*SCALE_FIELDS, *SOFTCAP_FIELDS))
        raise ValueError(
            f"{self.head.name}: what it does with the logits of its head is no scale or soft-cap of its configuration "
            f"({fields}); its log-probabilities cannot be had without its logits"
        )


class _Probe(torch.autograd.Function):
    """The probe, whose graph leads to the results: wrappers look for their parameters in that of a model's output."""

    @staticmethod
    def forward(ctx: Any, probe: Tensor, *results: Tensor) -> Tensor:
        ctx.count = len(results)
        return probe.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        return (None,) * (1 + ctx.count)


class _Tie(torch.autograd.Function):
    """The results, whose backward passes through the model's output, as that of a loss on logits does."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.logits = logits.shape, logits.dtype, logits.device
        return tuple(result.view_as(result) for result in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        shape, dtype, device = ctx.logits
        return torch.zeros(shape, dtype=dtype, device=device), *grads


def _tied(results: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
    names = [name for name, value in results.items() if value.requires_grad]
    if not names or not logits.requires_grad:
        return results
    tied = _Tie.apply(logits, *(results[name] for name in names))
    return results | dict(zip(names, tied, strict=True))
