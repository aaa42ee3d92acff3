"""When a recorder records: the registry of active recorders, the hooks on forwards and the patch of `generate`.

with recorder:               ACTIVE, hooks on each module of parts.entries, GeneratePatch in place of its generate
    model.generate(...)          begin_generate, then the forwards, then end_generate
        model.forward(...)       _begin_forward, then the layers, then _end_forward
            vgpo_mask                records_masks_of: is the mask one of the recorded decoder?
            vgpo_attention           records: is the layer recorded? observe: what it attended with
"""

import functools
import inspect
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vgpo_kernels.integrations.transformers.mask_intervals import KeyIntervals
from vgpo_kernels.integrations.transformers.model_parts import Parts
from vgpo_kernels.integrations.transformers.pictures import described

# The recorders that are active, over all models; empty outside of every `with`.
ACTIVE: list["RecorderBase"] = []
# The stance of torch.compile while ACTIVE is not empty: a compiled forward would run the hooks and the attention of
# the time when it was traced.
_EAGER: list[Any] = []


class Prompt(NamedTuple):
    """What a call of `generate` begins with.

    Args:
        ids: (B, P).
        end_tokens: ids that end a completion.
        described: the arguments that describe the images of the prompts, if the model takes any; the forwards may lack
            them, since generate may encode the images beforehand.
    """

    ids: Tensor
    end_tokens: tuple[int, ...]
    described: Mapping[str, Any] = MappingProxyType({})


class RecorderBase(ABC):
    """A context manager that receives the forwards of a model, its `generate`, and the inputs of its attention layers.

    Args:
        parts: of the model.
        layers: indices of the layers to record.
    """

    def __init__(self, parts: Parts, layers: tuple[int, ...]) -> None:
        self._parts = parts
        self._layers = layers
        self._prompt: Prompt | None = None  # of the running `generate`
        self._outermost: nn.Module | None = None  # whose forward runs
        self._undo: list[Callable[[], None]] = []

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the recorded layers, in the order of the first dimension of `mass`."""
        return self._layers

    def __enter__(self) -> Any:
        if not ACTIVE:
            _EAGER.append(torch.compiler.set_stance("force_eager"))
            _EAGER[-1].__enter__()
        ACTIVE.append(self)
        for module in self._parts.entries:
            before = module.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            after = module.register_forward_hook(self._after_forward, always_call=True)
            self._undo += [before.remove, after.remove]
            if callable(getattr(module, "generate", None)):
                GeneratePatch.install(module)
                self._undo.append(functools.partial(GeneratePatch.remove, module))
        return self

    def __exit__(self, *_: object) -> None:
        ACTIVE.remove(self)
        if not ACTIVE:  # recorders may end in any order
            _EAGER.pop().__exit__(None, None, None)
        while self._undo:
            self._undo.pop()()
        self._outermost = self._prompt = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "RecorderBase":
        """Returns itself: hooks of a copied model call this recorder, and `is_entry` rejects them."""
        return self

    def is_entry(self, module: nn.Module) -> bool:
        """Tells whether the module is one of the model's entries, and no copy of one."""
        return any(module is entry for entry in self._parts.entries)

    def records_masks_of(self, config: Any) -> bool:
        """Tells whether masks made for this configuration are those of the recorded decoder."""
        return id(config) in self._parts.configs

    def records(self, module: nn.Module) -> bool:
        """Tells whether the module belongs to the recorded decoder, in a forward that is recorded."""
        return self._outermost is not None and id(module) in self._parts.attention

    @property
    def generating(self) -> bool:
        """Whether a call of `generate` is running."""
        return self._prompt is not None

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A forward of the outermost module inside its own forward: the former was interrupted (KeyboardInterrupt).
        if not self.is_entry(module) or (self._outermost is not None and self._outermost is not module):
            return
        self._outermost = None
        if args:
            kwargs = {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs}
        self._begin_forward(type(module).__name__, kwargs)
        self._outermost = module

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        if self._outermost is module:
            self._outermost = None
            self._end_forward(output)

    @abstractmethod
    def _begin_forward(self, name: str, kwargs: dict[str, Any]) -> None:
        """Takes the arguments of an outermost forward of the class `name`."""

    @abstractmethod
    def _end_forward(self, output: Any) -> None:
        """Takes what the forward returned; None if it raised."""

    @abstractmethod
    def begin_generate(self, prompt: Prompt) -> None:
        """Takes the prompt of a call of `generate`."""

    @abstractmethod
    def end_generate(self, result: Any) -> None:
        """Takes what the call returned; None if it raised."""

    @abstractmethod
    def first_key(self, kv_length: int) -> int:
        """Returns the position of the first of `kv_length` keys, for masks that do not say it."""

    @abstractmethod
    def observe(
        self, layer: int, q: Tensor, k: Tensor, lse: Tensor | None, mask: KeyIntervals | None, options: dict[str, Any]
    ) -> None:
        """Takes what a layer attended with; no LSE and no mask if no recorder records the layer."""


class GeneratePatch:
    """What a module's `generate` is while it is recorded; a deep copy of the module has one that records nothing.

    Args:
        module: whose `generate` it is.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.replaced = module.__dict__.get("generate")
        functools.update_wrapper(self, self._original())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorders = [each for each in ACTIVE if each.is_entry(self.module) and not each.generating]
        if not recorders:
            return self._original()(*args, **kwargs)
        result = None
        try:
            prompt = read_prompt(self.module, args, kwargs)
            for recorder in recorders:
                recorder.begin_generate(prompt)
            result = self._original()(*args, **{"disable_compile": True, **kwargs})
        finally:
            for recorder in recorders:
                recorder.end_generate(result)
        return result

    def _original(self) -> Any:
        cls: Any = type(self.module)
        return self.replaced or types.MethodType(cls.generate, self.module)

    @staticmethod
    def install(module: nn.Module) -> None:
        """Patches the module, unless it is patched."""
        if not isinstance(module.__dict__.get("generate"), GeneratePatch):
            module.generate = GeneratePatch(module)  # type: ignore[assignment]

    @staticmethod
    def remove(module: nn.Module) -> None:
        """Takes the patch away, unless another recorder needs it or something else has replaced it since."""
        patch = module.__dict__.get("generate")
        if not isinstance(patch, GeneratePatch) or any(recorder.is_entry(module) for recorder in ACTIVE):
            return
        if patch.replaced is None:
            del module.generate
        else:
            module.generate = patch.replaced


def read_prompt(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prompt:
    """Returns the prompt and the end tokens of a call of `generate`.

    Raises:
        ValueError: no input_ids, beams, or guidance.
    """
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        raise ValueError("generate: expected input_ids (B, L) while visual attention is recorded")
    beams = _setting(module, kwargs, "num_beams") or 1
    if beams > 1:
        raise ValueError(f"num_beams: expected 1 while visual attention is recorded (beams change rows), got {beams}")
    guidance = _setting(module, kwargs, "guidance_scale")
    if guidance not in (None, 1):
        raise ValueError(
            "guidance_scale: expected 1 or None while visual attention is recorded (guidance runs a second sequence), "
            f"got {guidance}"
        )
    ends = _setting(module, kwargs, "eos_token_id")
    end_tokens = () if ends is None else tuple(torch.as_tensor(ends).flatten().tolist())
    return Prompt(ids, end_tokens, described(kwargs))


def _setting(module: Any, kwargs: dict[str, Any], name: str) -> Any:
    """Returns a setting as `generate` finds it: an argument, the given generation_config, or the model's."""
    if name in kwargs:
        return kwargs[name]
    given = getattr(kwargs.get("generation_config"), name, None)
    return getattr(module.generation_config, name, None) if given is None else given
