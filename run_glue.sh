#!/usr/bin/env bash
# The paper's main experiment (Table 1): 13 tasks x S1 and S2 x three seeds on google-t5/t5-large.
#
#   ./run_glue.sh                   every run that is not finished, then the table of results
#   ./run_glue.sh --dry-run         prints the commands, runs nothing
#   ./run_glue.sh --report          prints the table alone
#   ./run_glue.sh -- --data-dir DIR --epochs 1      what stands after -- goes to bipeft.py
#   TASKS="rte mrpc" SPACES=s2 SEEDS="0 1" RUNS=runs PYTHON=python3 ./run_glue.sh       a part of it
#
# One run at a time on each GPU of CUDA_VISIBLE_DEVICES, or of all that nvidia-smi lists; on none, one at
# a time on the CPU. The same command goes on after an interruption: a finished run (it has a metrics.json)
# is passed over, and bipeft.py resumes an unfinished one.
# Exit code: 0; 1 if a run failed (the others still run); 2 after a mistake in the arguments.
set -euo pipefail
GLUE="cola sst2 mrpc qqp stsb mnli qnli"
SUPERGLUE="boolq cb multirc record rte wic"
TASKS=${TASKS:-$GLUE $SUPERGLUE} SPACES=${SPACES:-s1 s2} SEEDS=${SEEDS:-0 1 2} RUNS=${RUNS:-runs}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-$([[ -x $here/.venv/bin/python ]] && echo "$here/.venv/bin/python" || echo python3)}

mistake() { echo "run_glue.sh: $1" >&2; exit 2; }
mode=run
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    --dry-run) mode=dry ;;
    --report) mode=report ;;
    *) mistake "unknown argument '$1': --dry-run or --report; flags of bipeft.py go after --" ;;
  esac
  shift
done
(($#)) && shift                                        # the -- itself: "$@" are now flags of bipeft.py
for flag in "$@"; do
  case $flag in --task* | --space* | --seed* | --out* | --fresh)
    mistake "$flag differs from run to run: use TASKS, SPACES, SEEDS, RUNS; delete a run's folder to redo it" ;;
  esac
done
command -v "$PYTHON" >/dev/null || mistake "there is no $PYTHON: set PYTHON to the Python to use"

report() {   # mean and sample deviation of the test scores, from the metrics.json files
  "$PYTHON" - "$RUNS" "$TASKS" "$SPACES" "$SEEDS" "$GLUE" "$SUPERGLUE" <<'END'
import json, pathlib, statistics as st, sys
tasks, spaces, seeds, *suites = (text.split() for text in sys.argv[2:])
print(f"{'task':<11}{'space':<7}{'metric':<10}{'seeds':>5}{'test, per cent':>18}{'of 10,000':>11}{'search/re-train':>17}")
means = {}
for space in spaces:
    for task in tasks:
        paths = [pathlib.Path(sys.argv[1], f"{task}-{space}-{seed}", "metrics.json") for seed in seeds]
        found = [json.loads(path.read_text()) for path in paths if path.is_file()]
        if not found:
            continue
        tests, ratios = [m["test"] for m in found], [m["ratio"] for m in found if m["ratio"] is not None]
        if len(found) == len(seeds):
            means[space, task] = st.mean(tests)
        mixed = len({json.dumps({**m["settings"], "seed": 0}, sort_keys=True) for m in found}) > 1
        print(f"{task:<11}{space:<7}{found[0]['metric']:<10}{len(found):>5}{st.mean(tests):10.2f} ± "
              + (f"{st.stdev(tests):5.2f}" if len(tests) > 1 else "    -")
              + f"{st.mean(m['per_ten_thousand'] for m in found):11.2f}"
              + (f"{st.mean(ratios):17.2f}" if ratios else f"{'-':>17}")
              + ("   seeds of different settings!" if mixed else ""))
    for name, suite in zip(("GLUE", "SuperGLUE"), suites):     # the paper's AVG, once all seeds are there
        if all((space, task) in means for task in suite):
            print(f"{name:<11}{space:<7}{'average':<15}{st.mean(means[space, t] for t in suite):10.2f}")
END
}
[[ $mode == report ]] && { report; exit; }

# Which GPUs: the variable decides if it is set (empty: none). A run sees only the one that it is given.
gpus=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true)}
read -ra gpus <<<"${gpus//[$',\n']/ }"
((${#gpus[@]})) || gpus=(none)
echo "# GPUs: ${gpus[*]}; each run is a folder of $RUNS, its output a .log beside it"

# The queue: a pipe with the names of the idle GPUs. A run takes one out and puts it back.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'trap - TERM; kill $(jobs -p) 2>/dev/null || true; wait; exit 130' INT TERM    # runs save, and end
mkfifo "$scratch/idle" && exec 3<>"$scratch/idle"
printf '%s\n' "${gpus[@]}" >&3
one_run() {  # NAME GPU COMMAND...: runs it, notes a failure, frees the GPU
  local code=0
  CUDA_VISIBLE_DEVICES=${2#none} "${@:3}" >>"$RUNS/$1.log" 2>&1 </dev/null 3>&- &
  trap 'kill $! 2>/dev/null; wait; exit' TERM
  wait $! || { code=$?; echo "$1" >>"$scratch/failed"; }
  ((code)) && echo "FAILED $1 (exit $code): $(tail -n 1 "$RUNS/$1.log")" || echo "done   $1"
  echo "$2" >&3
}
for task in $TASKS; do for space in $SPACES; do for seed in $SEEDS; do
  name=$task-$space-$seed
  [[ -f $RUNS/$name/metrics.json ]] && { echo "# finished before: $name"; continue; }
  command=("$PYTHON" "$here/bipeft.py" --model google-t5/t5-large --dtype bfloat16 "$@"
           --task "$task" --space "$space" --seed "$seed" --out "$RUNS/$name")
  [[ $mode == dry ]] && { printf '%q ' "${command[@]}"; echo; continue; }
  mkdir -p "$RUNS" && read -r gpu <&3
  echo "start  $name on GPU $gpu"
  one_run "$name" "$gpu" "${command[@]}" &
done; done; done
wait
[[ $mode == dry ]] || report
[[ ! -s $scratch/failed ]] || { echo "failed: $(sort "$scratch/failed" | xargs)"; exit 1; }
