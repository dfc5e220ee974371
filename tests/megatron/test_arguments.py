"""Our flags in Megatron's real parser: what turns the plugin on, and what each flag resolves to."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import pytest
import torch

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron import planned
from megatron_wallfacer.megatron.hooks import Hooks
from megatron_wallfacer.megatron.hooks import arguments as hooks_arguments
from megatron_wallfacer.megatron.model_shape import head_dim, heads_per_rank, shape_of, v_head_dim
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.version import megatron_version
from megatron_wallfacer.planning.cluster_file import load_cluster
from megatron_wallfacer.planning.search import search
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.schemes import SCHEMES

MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 8 --seq-length 1024 --micro-batch-size 1".split()

ON = ("--wallfacer-cp-size", "8")

Parse = Callable[..., PluginState]


def names_of(state: PluginState) -> list[str]:
    """The installed hooks."""
    return [hook.name for hook in state.hooks]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Iterator[Parse]:
    """``parse(*flags)``: parse as Megatron does, with the hooks installed; the state they filled in."""
    hooks = Hooks(PluginState(megatron_version(), torch.device("cpu")))
    hooks.install()

    def run(*flags: str, world: int = 8) -> PluginState:
        from megatron.training.arguments import add_megatron_arguments

        monkeypatch.setenv("WORLD_SIZE", str(world))
        argv = [*MODEL, "--attention-dropout", "0", *flags]
        monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *argv])
        parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
        parser.parse_args()
        return hooks.state

    yield run
    hooks.uninstall()


def test_auto_sees_the_heads_that_tensor_parallelism_leaves(parse: Parse) -> None:
    """One kv head of eight is shared by all tensor-parallel ranks: with two q heads at hand kappa is 1/2, not 1/8."""
    flags = "--tensor-model-parallel-size 4 --wallfacer-cp-size 2 --group-query-attention --num-query-groups 1"
    assert heads_per_rank(parse(*flags.split()).args) == (2, 1)


def test_a_size_that_only_a_checkpoint_knows_leaves_the_head_dim_open() -> None:
    assert head_dim(argparse.Namespace(kv_channels=None, hidden_size=None)) is None


def test_without_the_flag_only_the_parser_is_touched(parse: Parse) -> None:
    state = parse()
    assert not state.is_on
    assert names_of(state) == ["arguments", "start"]
    assert state.args.context_parallel_size == 1


def test_the_flag_sets_megatrons_own_and_installs_every_hook(parse: Parse) -> None:
    state = parse("--wallfacer-cp-size", "8")
    assert state.args.context_parallel_size == 8
    assert len(state.hooks) == 11
    assert state.settings.plan.grid.cp_size == 8


def test_a_sequence_cut_across_documents_needs_one_hook_more(parse: Parse) -> None:
    packed = ("--dataloader-inter-document-masking", "--no-rope-fusion")
    assert names_of(parse(*ON, *packed))[-1] == "rope of packed sequences"
    parse(*ON)


def test_documents_that_are_cut_need_no_hook(parse: Parse) -> None:
    assert len(parse(*ON, "--sft").hooks) == 11


def test_layers_with_a_window_may_have_a_scheme_of_their_own(parse: Parse) -> None:
    flags = "--wallfacer-scheme team-ring --wallfacer-team-size 2 --window-size 128,0"
    settings = parse(*ON, *flags.split()).settings
    assert settings.plans == (settings.plan,)
    assert settings.plan_of(window=True) is settings.plan_of(window=False) is settings.plan
    settings = parse(*ON, *flags.split(), "--wallfacer-window-scheme", "ulysses").settings
    assert settings.plan_of(window=True).grid == Grid(head=8, placement=("head",))
    assert settings.plan_of(window=False).grid.team == 2
    assert settings.plans == (settings.plan, settings.window_plan)


def test_latent_attention_has_keys_for_every_head_and_values_of_another_width(parse: Parse) -> None:
    latent = "--multi-latent-attention --qk-head-dim 24 --qk-pos-emb-head-dim 8 --v-head-dim 16 --num-query-groups 2"
    args = parse(*ON, *latent.split()).args
    assert heads_per_rank(args) == (8, 8)
    assert (head_dim(args), v_head_dim(args)) == (32, 16)
    shape = shape_of(args, torch.float32)
    assert (shape.elements("q"), shape.elements("v")) == (128 * 8 * 32, 128 * 8 * 16)


def test_equals_and_both_orders_of_an_agreeing_size_are_fine(parse: Parse) -> None:
    assert parse("--context-parallel-size=4", "--wallfacer-cp-size=4").is_on
    assert parse("--wallfacer-cp-size", "4", "--context-parallel-size", "4").is_on


def test_each_flag_reaches_the_plan(parse: Parse) -> None:
    flags = "--wallfacer-cp-size 8 --wallfacer-scheme wallfacer --wallfacer-team-size 2 --wallfacer-kernel reference"
    settings = parse(*flags.split(), "--wallfacer-placement", "rings-adjacent", "--wallfacer-keep-gathered-q").settings
    placement = ("ring_outer", "team", "kv_team")
    assert settings.plan.grid == Grid(team=2, kv_team=2, ring_outer=2, placement=placement)
    assert settings.plan.backward == "pass-q"
    assert (settings.flags.kernel, settings.flags.keep_gathered_q) == ("reference", True)


def test_transfers_are_direct_unless_asked_for(parse: Parse) -> None:
    assert parse(*ON).settings.flags.transfers == "direct"
    assert parse(*ON, "--wallfacer-transfers", "staged").settings.flags.transfers == "staged"


def test_layers_may_be_left_to_megatron_and_told_how_to_split(parse: Parse) -> None:
    flags = "--transformer-impl transformer_engine --wallfacer-layers 1 --cp-comm-type a2a"
    assert parse(*ON, *flags.split()).settings.layers.numbers == {1}
    assert parse(*ON).settings.layers is None


def test_each_axis_and_choice_reaches_the_plan(parse: Parse) -> None:
    flags = (
        "--wallfacer-cp-size 16 --wallfacer-head-size 2 --wallfacer-team-size 2 --wallfacer-kv-team-size 2 "
        "--wallfacer-ring-inner-size 2 --wallfacer-placement team,ring,kv_team,head --wallfacer-forward pass-q "
        "--wallfacer-backward pass-q --wallfacer-kv-order permuted --wallfacer-head-groups 4"
    )
    plan = parse(*flags.split(), world=16).settings.plan
    placement = ("team", "ring_inner", "ring_outer", "kv_team", "head")
    assert plan.grid == Grid(head=2, team=2, kv_team=2, ring_inner=2, placement=placement)
    assert (plan.forward, plan.backward, plan.kv_order, plan.head_groups) == ("pass-q", "pass-q", "permuted", 4)
    assert not plan.bidirectional


def test_both_directions_reach_the_plan(parse: Parse) -> None:
    assert parse(*ON, "--wallfacer-scheme", "ring", "--wallfacer-bidirectional").settings.plan.bidirectional


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_built(parse: Parse, scheme: str) -> None:
    plan = parse(*ON, "--wallfacer-scheme", scheme).settings.plan
    assert plan.grid.cp_size == 8
    assert plan.scheme == ("team-ring" if scheme == "auto" else scheme)


def test_heads_are_those_that_tensor_parallelism_leaves(parse: Parse) -> None:
    """Eight query heads and two kv heads on four tensor-parallel ranks: two and one are left, and may be divided."""
    flags = "--wallfacer-cp-size 2 --tensor-model-parallel-size 4 --wallfacer-scheme ulysses --group-query-attention"
    assert parse(*flags.split(), "--num-query-groups", "2").settings.plan.grid == Grid(head=2)


def test_auto_knows_grouped_queries(parse: Parse) -> None:
    """kappa = 1/8 makes K and V so cheap that the queries should not move."""
    long = (*ON, "--seq-length", "524288")
    mha = parse(*long).settings.plan.grid
    gqa = parse(*long, "--group-query-attention", "--num-query-groups", "1").settings.plan.grid
    assert mha.team > gqa.team == 1


def test_auto_knows_the_sequence_length(parse: Parse) -> None:
    """128 tokens per rank are one call, 64K tokens one call for each ring step."""
    short, long = (parse(*ON, "--seq-length", length).settings.plan.grid for length in ("1024", "524288"))
    assert short == Grid(kv_team=8)
    assert long.ring > 1


def test_our_other_flags_need_the_one_that_turns_it_on(parse: Parse) -> None:
    with pytest.raises(WallfacerError, match=r"--wallfacer-team-size 2: needs --wallfacer-cp-size"):
        parse("--wallfacer-team-size", "2")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--wallfacer-cp-size 0", r"--wallfacer-cp-size 0: must be a positive number"),
        ("--wallfacer-cp-size two", r"--wallfacer-cp-size two: must be a whole number"),
        ("--wallfacer-team-size 1.5", r"--wallfacer-team-size 1.5: must be a whole number"),
        ("--wallfacer-scheme nonsense", r"--wallfacer-scheme nonsense: must be one of auto, "),
        ("--wallfacer-team-size 3", r"--wallfacer-team-size 3: must be one of 1, 2, 4, 8 with scheme auto"),
        (
            "--wallfacer-cp-size 8 --wallfacer-team-size 4 --wallfacer-kv-team-size 4",
            r"--wallfacer-kv-team-size 4: must",
        ),
        (
            "--wallfacer-cp-size 8 --wallfacer-scheme wallfacer --wallfacer-team-size 4",
            r"--wallfacer-team-size 4: .*C\^2",
        ),
        (
            "--wallfacer-cp-size 8 --wallfacer-scheme ring --wallfacer-team-size 2",
            r"--wallfacer-team-size 2: must be 1",
        ),
        ("--wallfacer-window-scheme ring", r"--wallfacer-window-scheme ring: needs --window-size LEFT,RIGHT"),
        (
            "--window-size 8,0 --wallfacer-window-scheme nonsense",
            r"--wallfacer-window-scheme nonsense: must be one of auto, ",
        ),
        (
            "--num-attention-heads 4 --window-size 8,0 --wallfacer-window-scheme ulysses",
            r"--wallfacer-window-scheme ulysses: head size 8 must be one of 1, 2, 4 for 4",
        ),
        ("--wallfacer-layers odd", r"--wallfacer-layers odd: must be full, window, or layers like 1,3-8"),
        ("--wallfacer-layers 2-1", r"--wallfacer-layers 2-1: must be full, window, or layers like 1,3-8"),
        ("--wallfacer-layers 1,3", r"--wallfacer-layers 1,3: must be layers from 1 to 2, not 3"),
        ("--wallfacer-layers window", r"--wallfacer-layers window: needs --window-size"),
        (
            "--wallfacer-layers 1 --transformer-impl local",
            r"--wallfacer-layers 1: must be left out with --transformer-impl local",
        ),
        ("--cp-comm-type a2a", r"--cp-comm-type a2a: must be left out"),
        ("--wallfacer-head-size 3", r"--wallfacer-head-size 3: must be one of 1, 2, 4, 8 with scheme auto"),
        ("--wallfacer-head-size two", r"--wallfacer-head-size two: must be a whole number"),
        ("--wallfacer-head-groups 0", r"--wallfacer-head-groups 0: must be a positive number"),
        ("--wallfacer-head-groups x", r"--wallfacer-head-groups x: must be a whole number"),
        ("--wallfacer-ring-inner-size 3", r"--wallfacer-ring-inner-size 3: must be one of 1, 2, 4, 8 with scheme auto"),
        (
            "--wallfacer-scheme ring --wallfacer-ring-inner-size 2",
            r"--wallfacer-ring-inner-size 2: must be 1 with scheme ring",
        ),
        ("--wallfacer-scheme ulysses --wallfacer-head-size 2", r"--wallfacer-head-size 2: must be 8 with scheme"),
        (
            "--num-attention-heads 12 --wallfacer-head-size 8",
            r"--wallfacer-head-size 8: must be one of 1, 2, 3, 4, 6, 12 for 12 query and 12 kv heads",
        ),
        (
            "--num-attention-heads 4 --wallfacer-scheme ulysses",
            r"--wallfacer-head-size 8: must be one of 1, 2, 4 for 4",
        ),
        (
            "--wallfacer-cp-size 4 --tensor-model-parallel-size 4 --wallfacer-head-size 4",
            r"--wallfacer-head-size 4: must be one of 1, 2 for 2 query and 2 kv heads",
        ),
        (
            "--num-attention-heads 24 --group-query-attention --num-query-groups 3 --wallfacer-head-size 2",
            r"--wallfacer-head-size 2: must be one of 1, 3, 6, 12, 24 for 24 query and 3 kv heads",
        ),
        ("--wallfacer-kv-order odd", r"--wallfacer-kv-order odd: must be native, paper or permuted"),
        ("--wallfacer-scheme ring --wallfacer-kv-order paper", r"--wallfacer-kv-order paper: must be native"),
        ("--wallfacer-forward both", r"--wallfacer-forward both: must be auto, pass-kv or pass-q"),
        (
            "--wallfacer-scheme double-ring --wallfacer-bidirectional",
            r"--wallfacer-bidirectional .*: must be used with a single ring",
        ),
        (
            "--wallfacer-cluster hosts",
            r"cluster hosts: must be the name or file of a cluster: torchrun reports 8 ranks, 0 on",
        ),
        ("--wallfacer-cluster c.yaml", r"--wallfacer-cluster c.yaml: must be a file, or one of a100-"),
        (
            "--wallfacer-cluster h100-8x8 --wallfacer-team-size 2",
            r"--wallfacer-team-size 2: must be left out, because --wallfacer-cluster h100-8x8 chooses it",
        ),
        (
            "--wallfacer-cluster h100-8x8 --wallfacer-bidirectional",
            r"--wallfacer-bidirectional: must be left out, because --wallfacer-cluster",
        ),
        (
            "--wallfacer-cluster h100-8x8 --tensor-model-parallel-size 16",
            r"--wallfacer-cluster h100-8x8: must have 128 devices for --wallfacer-cp-size 8 and tensor",
        ),
        (
            "--wallfacer-cp-size 8 --wallfacer-placement sideways",
            r"--wallfacer-placement sideways: must be an order of",
        ),
        ("--wallfacer-backward both", r"--wallfacer-backward both: must be auto, pass-kv or pass-q"),
        (
            "--wallfacer-kernel te",
            r"--wallfacer-kernel te: must be auto or reference here, because te cannot: transform",
        ),
        ("--wallfacer-kernel magic", r"--wallfacer-kernel magic: must be one of auto, "),
    ],
)
def test_a_bad_value_is_one_line_with_flag_value_and_what_is_allowed(parse: Parse, flags: str, message: str) -> None:
    with pytest.raises(WallfacerError, match=message) as error:
        parse(*ON, *flags.split())
    assert "\n" not in str(error.value)


def test_the_planner_chooses_for_a_cluster(parse: Parse) -> None:
    """Two nodes of four ranks and slow cards: what crosses between nodes is least, and the same on every rank."""
    on = ("--wallfacer-cp-size", "8", "--wallfacer-cluster", "emulated-c-4x4", "--seq-length", "4096")
    lengths = ("--max-position-embeddings", "4096")
    one, other = (parse(*on, *lengths).settings for _ in range(2))
    assert one.plan == other.plan
    assert one.plan.grid.cp_size == 8
    assert one.plan.grid.ring_outer < 8
    assert one.flags.keep_gathered_q == (one.plan.grid.team > 1)
    # Its file has no link to host memory.
    assert one.overlapped_bytes is None


def test_the_planner_knows_what_is_copied_to_the_host_during_attention(parse: Parse) -> None:
    on = ("--wallfacer-cp-size", "8", "--wallfacer-cluster", "h100-8x8", "--max-position-embeddings", "8192")
    short, long = (parse(*on, "--seq-length", tokens).settings.overlapped_bytes for tokens in ("2048", "8192"))
    assert short is not None
    assert 0 < short < long
    assert parse("--wallfacer-cp-size", "8").settings.overlapped_bytes is None


def test_the_planner_chooses_for_the_jobs_own_hosts(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    on = ("--wallfacer-cp-size", "8", "--wallfacer-cluster", "hosts", "--seq-length", "4096")
    lengths = ("--max-position-embeddings", "4096")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(WallfacerError, match="hosts: must be the name or file of a cluster: GPU none is not one of H2"):
        parse(*on, *lengths)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    asked = []
    monkeypatch.setattr(planned, "search", lambda job: asked.append(job) or search(job))
    parse(*on, *lengths)
    (cluster,) = [job.cluster for job in asked]
    assert (cluster.nodes, cluster.gpus_per_node, cluster.nics) == (2, 4, 4)
    assert cluster.inter == load_cluster("h100-8x8").inter
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(
        WallfacerError, match="hosts: must be the name or file of a cluster: torchrun reports 8 ranks, 3 on this host"
    ):
        parse(*on, *lengths)


def test_ranks_that_share_a_gpu_take_one_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = argparse.Namespace(local_rank=5)
    hooks_arguments.share_gpus(args, torch.device("cpu"))
    assert args.local_rank == 5
    hooks_arguments.share_gpus(args, torch.device("cuda"))
    assert args.local_rank == 1


def test_gpus_are_shared_where_messages_go_through_the_host_or_nccl_may(
    parse: Parse, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = []
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    monkeypatch.setattr(hooks_arguments, "share_gpus", lambda args, device: shared.append(args))
    parse(*ON)
    assert not shared
    parse(*ON, "--wallfacer-transfers", "staged")
    assert len(shared) == 1
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    parse(*ON)
    assert len(shared) == 2
