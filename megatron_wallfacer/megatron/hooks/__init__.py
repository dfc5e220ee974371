"""The hooks: the places where the plugin's own features touch Megatron.

=================  ==========================================================  ==============================
hook               target                                                      why
=================  ==========================================================  ==============================
arguments          ``megatron.training.arguments.add_megatron_arguments``      our flags; checks after parsing
start              ``megatron.training.initialize._initialize_distributed``    ranks compare their settings
groups             ``megatron.core.parallel_state.initialize_model_parallel``  axis groups, on every rank
groups, dropped    ``megatron.core.parallel_state.destroy_model_parallel``     drops them
core attention     ``core_attention`` of the local and the TE spec provider    our module in every layer
layer count        ``megatron.training.training.setup_model_and_optimizer``    N of N, before the first step
rope               ``..rope_utils._apply_rotary_pos_emb_thd``                  packed, sequence cut as a whole
mean loss          ``..pipeline_parallel.schedules.forward_step_calc_loss``    mean over the group's tokens
MTP loss           ``megatron.core.models.gpt.gpt_model.process_mtp_loss``     the same for extra layers
MTP shift          ``..transformer.multi_token_prediction.roll_tensor``        padded documents
generation         ``Attention._adjust_key_value_for_inference``                stops before the first token
training log       ``megatron.training.training.training_log``                 metrics, with ``-log-metrics`` only
layer inputs       ``megatron.core.tensor_parallel.checkpoint``                in host memory, with its flag only
=================  ==========================================================  ==============================

The hooks arguments and start are always in; the first installs the others when ``--wallfacer-cp-size`` is given, so
that without the flag Megatron runs as it is. What Megatron lacks where libraries are missing is in `any_device` and
`cpu_runtime`.
"""

from megatron_wallfacer.megatron.hooks.registry import Hooks

__all__ = ["Hooks"]
