"""Trains a GPT with the training loop of a 0.17 or 0.18 wheel, which, unlike later ones, has no model builder.

Only what the version matrix needs: one stage, one tensor-parallel rank, tokens out of a generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu, package_info
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training import get_args, pretrain
from torch import Tensor

Sample = dict[str, Tensor]


class Tokens(torch.utils.data.Dataset):
    """As many samples as are asked for, each its own seed's."""

    def __init__(self, samples: int, length: int, vocabulary: int) -> None:
        self._samples, self._length, self._vocabulary = samples, length, vocabulary

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(self._vocabulary, (self._length + 1,), generator=generator)
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(self._length),
            "position_ids": torch.arange(self._length),
            "attention_mask": torch.ones(1, self._length, self._length, dtype=torch.bool).triu(1),
        }


def data_sets(num_samples: list[int], vp_stage: int | None = None) -> tuple:
    args = get_args()
    return tuple(Tokens(count, args.seq_length, args.padded_vocab_size) if count else None for count in num_samples)


data_sets.is_distributed = True


def build_model(pre_process: bool = True, post_process: bool = True, **_: Any) -> GPTModel:
    args = get_args()
    if version >= (0, 18):
        from megatron.training.argument_utils import core_transformer_config_from_args
    else:
        from megatron.training.arguments import core_transformer_config_from_args
    spec = get_gpt_layer_local_spec(normalization=args.normalization)
    options = {"position_embedding_type": args.position_embedding_type, "share_embeddings_and_output_weights": True}
    config = core_transformer_config_from_args(args)
    return GPTModel(config, spec, args.padded_vocab_size, args.seq_length, pre_process, post_process, **options)


def masked_loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    loss, count = torch.dot(losses.flatten().float(), mask.flatten()), mask.sum().to(torch.int)
    return loss, count, {"lm loss": torch.stack([loss.detach(), count.to(loss.dtype)])}


def forward_step(samples: Iterator[Sample], model: torch.nn.Module) -> tuple[Tensor, partial]:
    options = {"is_hybrid_cp": False} if version >= (0, 18) else {}
    batch = get_batch_on_this_cp_rank(next(samples), cp_group=mpu.get_context_parallel_group(), **options)
    output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return output, partial(masked_loss, batch["loss_mask"])


def main() -> None:
    if version < (0, 18):
        pretrain(data_sets, build_model, ModelType.encoder_or_decoder, forward_step)
        return
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    config = pretrain_cfg_container_from_args(parse_and_validate_args())
    pretrain(config, data_sets, build_model, ModelType.encoder_or_decoder, forward_step)


version = (package_info.MAJOR, package_info.MINOR)
if __name__ == "__main__":
    main()
