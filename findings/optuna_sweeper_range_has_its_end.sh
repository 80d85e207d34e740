#!/usr/bin/env bash
# hydra-optuna-sweeper 1.3.0, hydra-core 1.3.8, optuna 5.0.0 (and 2.10.1)
#
# What happens: Hydra's grammar has range(1,3) for 1 and 2, without its end, and its basic sweeper runs these. The Optuna
# sweeper makes a distribution of the same text that includes the end, so trials with 3 are run. With Optuna's grid sampler,
# which it counts apart, the same range is 1 and 2 again.
#
# What one would expect: range(1,3) is 1 and 2 for each sweeper, as the grammar says.
#
# Why it hurts: a study tries values that the grid beside it does not have, and that may not be allowed at all (the number of
# layers of a model, a column, a fold). Nothing is said of it, and the best value may be one that was not listed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq hydra-core==1.3.8 optuna==5.0.0
"$work/venv/bin/python" -m pip install -qq --no-deps hydra-optuna-sweeper==1.3.0
cd "$work"
cat > program.py <<'PYTHON'
import hydra


@hydra.main(config_path=None, version_base="1.3")
def main(config) -> float:
    with open(config.file, "a") as file:
        file.write(f"{config.x}\n")
    return float(config.x)


main()
PYTHON
export PYTHONWARNINGS=ignore
quiet="hydra/hydra_logging=disabled hydra/job_logging=disabled hydra.output_subdir=null"
for sweeper in basic "optuna hydra.sweeper.n_trials=30 hydra.sweeper.sampler.seed=0" "optuna hydra/sweeper/sampler=grid"; do
    file="$work/$(echo "$sweeper" | tr -c 'a-z0-9\n' _)"
    # shellcheck disable=SC2086
    "$work/venv/bin/python" program.py -m hydra/sweeper=$sweeper $quiet "+file=$file" "+x=range(1,3)" 2>/dev/null
    echo "$(sort -u "$file" | tr '\n' ' ')" >> seen
done
echo "expected: 1 2 for each sweeper"
paste -d: <(printf '%s\n' basic "optuna (TPE)" "optuna (grid sampler)") seen
if [ "$(cat seen)" = "$(printf '1 2 \n1 2 3 \n1 2 ')" ]; then echo "as described above"; else echo "CHANGED: not as described above"; exit 1; fi
