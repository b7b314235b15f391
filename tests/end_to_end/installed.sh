#!/usr/bin/env bash
# What a user of the package does in an empty folder; bin/ of the environment that it is installed in is the argument.
set -euxo pipefail
stablelm=$1/stablelm
small=(model.n_layers=3 model.d_model=32 evaluate.batches=2)

"$stablelm" --version
"$stablelm" pretrain --config quickstart train.steps=6 observe.every=2 "${small[@]}"
"$stablelm" checkpoints verify runs/quickstart
"$stablelm" eval --checkpoint runs/quickstart --out figures.json
"$stablelm" report runs/quickstart --out page.html
"$stablelm" generate --checkpoint runs/quickstart --prompt "The function returns" --max-new-tokens 8
"$stablelm" export --checkpoint runs/quickstart --out exported
"$stablelm" probe --config quickstart "${small[@]}" --out probe
"$stablelm" plan --config runs/c4-24x256.yaml --config data/c4 data.tokenizer=embedded --world-size 8 --quick
"$stablelm" preview --config configs/quickstart.yaml --documents 50
"$1/python" -c 'import stablelm; print(stablelm.score(stablelm.load_model("runs/quickstart"), "The function returns"))'
