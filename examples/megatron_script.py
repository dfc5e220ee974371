"""A Megatron script with a training loop of its own; it needs megatron-core 0.19.

    torchrun --nproc-per-node 2 examples/megatron_script.py --wallfacer-cp-size 2 --num-layers 2 --hidden-size 64 \
        --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256 --micro-batch-size 1 \
        --position-embedding-type rope --tokenizer-type NullTokenizer --vocab-size 256 --attention-dropout 0 \
        --hidden-dropout 0 --train-iters 5
"""

# The plugin comes before PyTorch and Megatron: it adds its flags to Megatron's parser and replaces core attention.
import megatron_wallfacer.auto  # noqa: F401, I001

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training import get_args
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.initialize import initialize_megatron


def build_model() -> GPTModel:
    """Return a GPT model of Megatron's own layers, whose core attention is the plugin's."""
    args = get_args()
    config = core_transformer_config_from_args(args)
    sizes = {"vocab_size": args.padded_vocab_size, "max_sequence_length": args.max_position_embeddings}
    embedding = args.position_embedding_type
    return GPTModel(config, get_gpt_layer_local_spec(), **sizes, position_embedding_type=embedding).cuda()


def next_batch(generator: torch.Generator) -> dict[str, torch.Tensor | None]:
    """Return this rank's chunks of a random batch: ``[micro_batch, seq_length / P]`` each."""
    args = get_args()
    shape = (args.micro_batch_size, args.seq_length + 1)
    tokens = torch.randint(args.vocab_size, shape, generator=generator).cuda()
    positions = torch.arange(args.seq_length).cuda().expand(args.micro_batch_size, -1)
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": positions, "cu_seqlens": None}
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())


def main() -> None:
    """Train for --train-iters steps and print the mean loss over all tokens of each."""
    parse_and_validate_args()
    initialize_megatron()
    args, group = get_args(), mpu.get_context_parallel_group()
    model, generator = build_model(), torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(args.train_iters):
        batch = next_batch(generator)
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        # Each rank has the losses of its own tokens: the mean over the sequence is the mean over the ranks.
        loss = losses.mean() / group.size()
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, group=group)
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean, group=group)
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {mean.item():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
