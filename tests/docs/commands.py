"""What each command of the pages needs: add a line for a new one, here or there."""

from __future__ import annotations

#: Run by tests/docs/test_commands.py, each as it is typed, in the repository; exit code 0.
HERE = (
    "wallfacer schemes --cp-size 16 --q-heads 8 --kv-heads 8",
    "wallfacer schemes --cp-size 16 --q-heads 8 --kv-heads 2",
    "wallfacer config show configs/llama3-8b-128k.yaml --lr 1e-5",
    "wallfacer config show configs/llama3-8b-128k.yaml --mock-data=false --data-path DATA "
    "--tokenizer-type NullTokenizer",
    "wallfacer run configs/llama3-8b-128k.yaml --rdzv-endpoint node1:29400 --dry-run",
    "wallfacer plan --cluster a100-8x8-ethernet --model gpt-7b --seq 64K --scheme wallfacer --team-size 4",
    "python -m benchmarks.emulated benchmarks/configs/c-4x4.yaml --list",
    "python -m benchmarks.calls --list",
)

_CLUSTER = "needs a cluster"
_GPU = "needs a GPU"
_ROOT = "needs root and minutes: network namespaces"
_LONG = "minutes, and more"
_PLAN = "tests/cli/test_plan.py, at sizes that take less time"
_TINY = "tests/cli/test_run.py"
_TUTORIAL = "tests/docs/test_tutorial.py"
_DOCTOR = "tests/doctor/test_doctor.py"
_SBATCH = "tests/slurm"

#: Not run here: the test that does, or why none can.
ELSEWHERE = {
    # README.md, docs/index.md, CONTRIBUTING.md, docs/tutorial.md
    "make demo": f"{_LONG}; what it trains and compares is that of tests/megatron/test_parity.py",
    "make test": "is this",
    'make test ARGS="tests/schedule tests/engine -x"': "is a part of this",
    "make bootstrap": "tests/test_bootstrap.py",
    "make lint": "the step before this one",
    "make docs": "tests/docs/test_site.py",
    "torchrun --nproc-per-node 8 -m megatron_wallfacer /path/to/Megatron-LM/pretrain_gpt.py <your arguments> "
    "--attention-dropout 0 --wallfacer-cp-size 8": "the reader's own arguments; tests/megatron/test_parity.py",
    "wallfacer run configs/tiny-cpu.yaml --train-iters 2": _TINY,
    "wallfacer run tiny-cpu --train-iters 2": _TINY,
    "wallfacer plan --cluster h100-8x8 --nodes 2 --model llama3-8b --seq 128K": "tests/test_readme.py",
    "wallfacer run configs/tiny-cpu.yaml --train-iters 3 --wallfacer-timeline runs/lines | grep wallfacer:": _TINY,
    "wallfacer trace runs/lines": "tests/traces/test_trace.py",
    "wallfacer doctor": _DOCTOR,
    "wallfacer plan --cluster h100-8x8 --model llama3-8b --seq 128K": _PLAN,
    "wallfacer plan --cluster h100-8x8 --nodes 2 --model llama3-8b --seq 128K --save best.yaml": _TUTORIAL,
    "wallfacer config check job.yaml": _TUTORIAL,
    "DRY_RUN=1 CONFIG=configs/llama3-8b-128k.yaml scripts/slurm/pretrain_gpt.sbatch": _SBATCH,
    "CONFIG=configs/llama3-8b-128k.yaml sbatch --nodes=2 scripts/slurm/pretrain_gpt.sbatch "
    "--train-iters 1000": _CLUSTER,
    "DRY_RUN=1 CONFIG=job.yaml scripts/slurm/pretrain_gpt.sbatch": _SBATCH,
    "CONFIG=job.yaml sbatch --nodes=2 scripts/slurm/pretrain_gpt.sbatch --train-iters 1000": _CLUSTER,
    # docs/choosing.md
    "torchrun --nproc-per-node 8 --no-python wallfacer tune --model llama3-8b --seq 128K --save best.yaml": _GPU,
    "wallfacer plan --cluster h100-8x8 --model llama3-8b --seq 64K": _PLAN,
    "wallfacer plan --cluster h200-8x8 --model llama3-8b --seq 64K": _PLAN,
    "wallfacer plan --cluster h100-1024x8 --nodes 64 --model llama3-8b --seq 1M": _PLAN,
    "python -m benchmarks.paired OTHER c-4x4 --schemes u1-i4-c2-o2 u2-i2-c2-o2 double-ring-1 "
    "--out DIR": "tests/benchmarks/test_paired.py, with a stand-in for the interpreter",
    "python -m benchmarks.price": "tests/benchmarks/test_price.py, with one job",
    # docs/reliability.md
    "python -m benchmarks.verify": "tests/benchmarks/test_verify.py, with few tokens",
    "python -m benchmarks.longest": "tests/benchmarks/test_longest.py, with one row",
    "python -m benchmarks.choices": "tests/benchmarks/test_choices.py, with one scheme",
    "python -m benchmarks.order --runs docs/data/emulated-2026-11-28/*": "tests/benchmarks/test_order.py, with one run",
    # docs/benchmarks.md
    "python -m benchmarks.emulated benchmarks/configs/b-4x4.yaml --schemes ring 'team-ring-*' 'usp-*' --repeats 9 "
    "--out DIR": _ROOT,
    "python -m pip install --no-deps --target benchmarks/.peers -r benchmarks/peers/requirements.txt": "a network",
    "benchmarks/suite.sh runs/benchmarks/grid": _ROOT,
    "python -m benchmarks.claims runs/benchmarks/grid": "tests/benchmarks/test_claims.py",
    "python -m benchmarks.host": f"{_LONG}; tests/benchmarks/test_host.py measures some of it",
    "python -m benchmarks.memory --ranks": "tests/benchmarks/test_memory.py counts three of them",
    "python -m benchmarks.memory": "tests/benchmarks/test_memory.py counts others of the same",
    "python -m benchmarks.memory --mlp-tiles 16 --loss-tiles 128": "tests/benchmarks/test_memory.py counts it",
    "python -m benchmarks.host --peers": "needs the peers, which are not installed with the project",
    "python -m benchmarks.emulated benchmarks/configs/overhead-1x8.yaml --allow-busy --repeats 2 --schemes ring "
    "double-ring burst all-gather tokenring usp mesh wallfacer-2-in u2-i1-c2-o2 team-ring-4-in": _ROOT,
    "python -m benchmarks.processor benchmarks/configs/overhead-1x8.yaml --schemes double-ring": _ROOT,
    "python -m benchmarks.processor benchmarks/configs/overhead-1x16.yaml --schemes ring double-ring burst all-gather "
    "tokenring usp mesh wallfacer-4-in team-ring-4-in u2-i1-c2-o4": _LONG,
    "python -m benchmarks.processor benchmarks/configs/overhead-1x16-long.yaml --schemes all-gather burst "
    "double-ring": _LONG,
    # docs/compatibility.md, docs/kernels.md
    "make composition": f"{_LONG}; tests/composition/test_short.py trains some of it",
    "python -m scripts.versions": f"{_LONG}; tests/versions",
    "python -m scripts.versions --check docs/compatibility.md": f"{_LONG}; tests/versions",
    "MEGATRON_PATHS=/path/a:/path/b python -m scripts.versions": f"{_LONG}; tests/versions",
    "python -m pytest tests/kernels/test_contracts.py": "is a part of this",
    # docs/doctor.md, docs/seeing.md, docs/gpu.md
    "wallfacer doctor --megatron-path /path/to/Megatron-LM": _DOCTOR,
    "wallfacer doctor | grep ^problem": _DOCTOR,
    "wallfacer doctor --json": _DOCTOR,
    "torchrun --nproc-per-node 4 -m megatron_wallfacer pretrain_gpt.py <your arguments> --wallfacer-cp-size 4 "
    "--wallfacer-timeline runs/lines": "the reader's own arguments; tests/megatron/test_timeline.py",
    "torchrun --nproc-per-node 4 -m megatron_wallfacer pretrain_gpt.py <your arguments> --wallfacer-cp-size 4 "
    "--tensorboard-dir runs/tensorboard --wallfacer-log-metrics": "the same; tests/megatron/test_metrics.py",
    "wallfacer view --cp-size 16 --out grid.html": "tests/plots/test_viewer.py",
    "scripts/gpu_acceptance.sh": _GPU,
    "python -m benchmarks.gpu.traffic --launches": f"{_LONG}; tests/benchmarks/gpu/test_launches.py counts the same",
    "scripts/gpu_acceptance.sh --smoke": "tests/benchmarks/gpu/test_acceptance.py",
    "scripts/gpu_acceptance.sh --list": "tests/benchmarks/gpu/test_acceptance.py",
    "scripts/gpu_acceptance.sh --only peers": _GPU,
    "NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_MAX_CTAS=8 torchrun --nproc-per-node 4 -m megatron_wallfacer pretrain_gpt.py "
    "... --wallfacer-cp-size 4": _GPU,
    # docs/reliability.md
    "python -m benchmarks.agreement": "tests/benchmarks/test_agreement.py, with fewer ranks",
    "python -m tests.faults": f"{_LONG}; its tests are a part of this",
    # docs/planning.md
    "wallfacer plan --cluster h100-8x8 --nodes 1 --model llama3-8b --seq 1M": "tests/docs/test_tables.py",
    "wallfacer plan --cluster h100-8x8 --nodes 1 --model llama3-8b --max-seq": "tests/planning/test_longest.py",
    "wallfacer plan --cluster h100-8x8 --model llama3-8b --seq 1M": _PLAN,
    "wallfacer plan --cluster h100-8x8 --nodes 4 --model llama3-70b --tp 8 --seq 256K --save best.yaml "
    "--plot best.png": _PLAN,
    # docs/paper.md
    "python -m benchmarks.paper figure-7": f"{_LONG}; tests/benchmarks/test_paper.py",
    "python -m benchmarks.paper others": "tests/benchmarks/test_paper.py",
    "python -m benchmarks.paper scaling": f"{_LONG}; tests/benchmarks/test_paper.py, with fewer devices",
    "python -m benchmarks.predict runs/benchmarks/c-4x4 runs/benchmarks/b-4x4 ...": "needs those runs; "
    "tests/benchmarks/test_predict.py",
    # docs/presets.md
    "wallfacer config check configs/llama3-8b-128k.yaml": "tests/presets",
    "wallfacer run configs/paper-7b-64k.yaml --rdzv-endpoint node1:29400": _CLUSTER,
    "scripts/apply_patch.sh MEGATRON_PATH": "tests/patches/test_apply_patch.py",
    "scripts/apply_patch.sh MEGATRON_PATH --revert": "tests/patches/test_apply_patch.py",
    # docs/slurm.md
    "CONFIG=configs/tiny-cpu.yaml sbatch --nodes=1 --gpus-per-node=0 scripts/slurm/pretrain_gpt.sbatch": _SBATCH,
    'CONFIG=configs/llama3-8b-128k.yaml CP_SIZES="4 8" SEQ_LENGTHS="65536 131072" SCHEMES="team-ring ring" '
    'SBATCH_ARGS="--nodes=2 --time=20" scripts/slurm/sweep.sh': _SBATCH,
    "scripts/slurm/sweep.sh --collect > sweep.csv": _SBATCH,
}
