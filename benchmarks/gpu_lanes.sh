#!/usr/bin/env bash
# What is still to be measured on photographs, side by side on one GPU that is lent for minutes: DVERGE/3 trained longer, every
# transfer attack from the hold-out surrogate, and AutoAttack beside ours. robench must be importable (PYTHONPATH does).
#
#   benchmarks/gpu_lanes.sh DATA RUNS AUTOATTACK OUT [SECONDS]
#
# DATA is the folder that benchmarks/gpu.py takes; RUNS has the runs baseline-3, dverge-3, hold-out-3 and advoap-8;
# AUTOATTACK is a clone of github.com/fra31/auto-attack. After SECONDS everything is stopped, and OUT has what is done: rows
# and tables in all.tar, and the training with its checkpoint in a file of its own. A killed training goes on from that.
set -uo pipefail -m  # every lane is a process group
if [ $# -lt 4 ]; then
    sed -n 's/^#   //p' "$0" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")/.." && pwd)
data=$(realpath "$1") runs=$(realpath "$2") clone=$(realpath "$3") seconds=${5:-540}
mkdir -p "$4" && out=$(realpath "$4")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
began=$SECONDS
cd "$here"
mkdir -p build/cifar10-jpeg/images "$work/study/runs" "$work/logs" "$work/strongest" "$out"
[ -d build/cifar10-jpeg/images/test ] || tar -xJf "$data/cifar10-jpeg75.tar.xz" -C build/cifar10-jpeg/images
cp -r results/cifar10-jpeg/runs/* "$work/study/runs/"
cp -r "$runs" "$work/runs"

# -P: what lies here is the source tree, whose folder `robench` lacks attacks and defenses.
robench() { python3 -P -m robench "$@"; }
strongest() {
    python3 -P benchmarks/strongest.py "$@" --dataset "npz:$data/cifar10-lossless-subset.npz" --device cuda \
        --runs "$work/runs" --out "$work/strongest" --official "$clone"
}
transfer() {
    for attack in "$@"; do
        robench eval baseline-3 dverge-3 --threat blackbox --surrogates hold-out-3 --attacks "$attack" --losses ce,cw \
            --eps .03 --samples 1000 --precision bfloat16 --device cuda --runs "$work/runs" \
            --dataset "npz:$data/cifar10-lossless-subset.npz"
    done
}
advoap() { for eps in .03 .01; do strongest advoap-8 --eps "$eps" --batch-size 100 --attacks "$1"; done; }
lane() { # NAME COMMAND...
    local name=$1
    shift
    "$@" > "$work/logs/$name.log" 2>&1 &
}
published() {
    strongest baseline-3 --eps .01 --batch-size 300
    strongest dverge-3 --eps .03,.01 --batch-size 300
}

lane train robench run benchmarks/cifar10_jpeg.toml --only train --workers 1 --device cuda --out "$work/study" \
    --set defenses.dverge.epochs=20 --set track.every=4
lane transfer1 transfer pgd svre bsr vmi pgn admix sim
lane transfer2 transfer mdi2 sgm sia mef gra tim
lane published published
lane advoap1 advoap "pgd,official AutoAttack"
lane advoap2 advoap mora,strongest,square
while [ $((SECONDS - began)) -lt "$seconds" ] && [ -n "$(jobs -r)" ]; do sleep 1; done
[ -z "$(jobs -r)" ] || echo "out of time: $(jobs -r | wc -l) of 6 lanes were stopped" >&2
for group in $(jobs -p); do kill -KILL -- "-$group" 2> /dev/null; done
wait 2> /dev/null
tar -C "$work" -cf "$out/all.tar" --exclude .crafted --exclude '*.tmp' --exclude weights.safetensors runs strongest logs
for run in "$work"/study/runs/*; do
    name=$(basename "$run")
    [ -d "results/cifar10-jpeg/runs/$name" ] || tar -C "$work/study" -cf "$out/$name.tar" "runs/$name"
done
