"""A transformer model described by Megatron's flags, with its parameters, FLOPs and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.volume import Shape

#: Activations that backward recomputes. ``keep-attention`` is the choice of the WallFacer paper (section 4.6): the
#: checkpoint is after attention, so attention runs once, projections and the MLP twice. ``full`` repeats attention too.
Recompute = Literal["none", "keep-attention", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "keep-attention", "full")
#: Bytes of bf16 and of fp32.
_HALF, _SINGLE = 2, 4
#: Factor for each suffix of a sequence length.
_SUFFIXES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer.

    Attributes:
        name: name of the model.
        layers: value of ``--num-layers``.
        hidden: value of ``--hidden-size``.
        ffn_hidden: value of ``--ffn-hidden-size``; for a mixture of experts, the size of one expert.
        q_heads: value of ``--num-attention-heads``.
        kv_heads: value of ``--num-query-groups``.
        head_dim: value of ``--kv-channels``.
        vocabulary: padded vocabulary size.
        swiglu: whether the MLP has three matrices instead of two.
        tied: whether LM head and embedding share their weights.
        experts: experts per layer; 1 for a dense model.
        top_k: experts per token; 1 for a dense model.
    """

    name: str
    layers: int
    hidden: int
    ffn_hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    swiglu: bool = True
    tied: bool = False
    experts: int = 1
    top_k: int = 1

    @property
    def attention_parameters(self) -> int:
        """Return the number of parameters of one layer's attention projections."""
        return self.hidden * self.head_dim * 2 * (self.q_heads + self.kv_heads)

    @property
    def expert_parameters(self) -> int:
        """Return the number of parameters of one MLP, or of one expert."""
        return self.hidden * self.ffn_hidden * (3 if self.swiglu else 2)

    @property
    def layer_parameters(self) -> int:
        """Return the number of parameters of one layer: matrices, two norms and, with experts, a router."""
        router = self.hidden * self.experts if self.experts > 1 else 0
        return self.attention_parameters + self.experts * self.expert_parameters + router + 2 * self.hidden

    @property
    def vocabulary_parameters(self) -> int:
        """Return the number of parameters of embedding and LM head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    def matmul_flops(self) -> float:
        """Return the forward FLOPs per token of one layer's matrix products, without attention itself."""
        return 2.0 * (self.attention_parameters + self.top_k * self.expert_parameters)

    def mlp_flops(self) -> float:
        """Return the forward FLOPs per token of one layer's MLP."""
        return 2.0 * self.top_k * self.expert_parameters

    def attention_flops(self, tokens: int, *, causal: bool) -> float:
        """Return the forward FLOPs of one layer's attention for one sequence: two products per unmasked pair."""
        return 4.0 * tokens * tokens * self.q_heads * self.head_dim * (0.5 if causal else 1.0)

    def head_flops(self) -> float:
        """Return the forward FLOPs per token of the LM head."""
        return 2.0 * self.hidden * self.vocabulary

    def step_flops(self, tokens: int, *, causal: bool) -> float:
        """Return the model FLOPs of a step for one sequence. Backward has twice the FLOPs of forward."""
        layer = tokens * self.matmul_flops() + self.attention_flops(tokens, causal=causal)
        return 3.0 * (self.layers * layer + tokens * self.head_flops())

    def touched_bytes(self) -> float:
        """Return the bf16 bytes per token that norms, residuals and activation functions of a layer move in forward.

        Each norm and residual reads two tensors and writes one. The activation function reads its input and writes its
        output.
        """
        return _HALF * (4 * 3 * self.hidden + self.top_k * self.ffn_hidden * (3 if self.swiglu else 2))

    def shape(self, tokens: int, *, tp: int = 1, accumulate_itemsize: int = _SINGLE) -> Shape:
        """Return the sizes of the shard of a rank with ``tokens`` tokens and 1/tp of the heads.

        Raises:
            OptionError: The tensor-parallel size does not divide the heads.
        """
        if tp < 1 or self.q_heads % tp or self.kv_heads % tp:
            raise OptionError("tp", tp, f"a divisor of {self.q_heads} query and {self.kv_heads} kv heads")
        return Shape(
            tokens, self.q_heads // tp, self.kv_heads // tp, self.head_dim, accumulate_itemsize=accumulate_itemsize
        )


_ALL = (
    # The two models of the WallFacer paper (section 5). It states neither the vocabulary (here GPT-2's) nor tying.
    Model("gpt-3b", 12, 4096, 16384, 16, 16, 256, 50304, swiglu=False, tied=True),
    Model("gpt-7b", 32, 4096, 16384, 32, 32, 128, 50304, swiglu=False, tied=True),
    Model("llama3-8b", 32, 4096, 14336, 32, 8, 128, 128256),
    Model("llama3-70b", 80, 8192, 28672, 64, 8, 128, 128256),
    Model("qwen3-8b", 36, 4096, 12288, 32, 8, 128, 151936),
)
#: Models by their name in ``wallfacer plan --model``.
MODELS: Mapping[str, Model] = MappingProxyType({model.name: model for model in _ALL})


def model_named(name: str) -> Model:
    """Return the model in :data:`MODELS` that has this name.

    Raises:
        OptionError: No model has this name.
    """
    if name not in MODELS:
        raise OptionError("model", name, f"one of {', '.join(MODELS)}")
    return MODELS[name]


def token_count(text: str) -> int:
    """Return the number of tokens of a length such as ``65536``, ``128K``, ``1M`` or ``1G``, where K is 1024.

    Raises:
        OptionError: The text is not a length.
    """
    match = re.fullmatch(r"([1-9][0-9]*)([kmg]?)", text.strip().lower())
    if not match:
        raise OptionError("seq", text, "a number of tokens such as 65536, 128K or 1M")
    return int(match[1]) * _SUFFIXES[match[2]]
