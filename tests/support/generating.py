"""Like scripts/pretrain_gpt.py, but the model is given a cache of keys and values, as a script that generates does."""

import runpy
from functools import wraps

from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.transformer_block import TransformerBlock

from tests.support.conversations_training import SCRIPT

forward = TransformerBlock.forward


@wraps(forward)
def with_cache(block: TransformerBlock, *args: object, **kwargs: object) -> object:
    block.eval()
    context = StaticInferenceContext(max_batch_size=1, max_sequence_length=256)
    return forward(block, *args, **kwargs | {"inference_context": context})


TransformerBlock.forward = with_cache
runpy.run_path(str(SCRIPT), run_name="__main__")
