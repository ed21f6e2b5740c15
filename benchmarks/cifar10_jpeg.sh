#!/usr/bin/env bash
# One piece of the CIFAR-10 (JPEG) study, for a GPU that is lent for minutes and forgets everything afterwards: unpacks
# what the pieces before have done, goes on for MINUTES, packs what is done now (weights, rows, report; no images).
#
#   benchmarks/cifar10_jpeg.sh IMAGES.tar.xz STATE OUT [MINUTES] [options of robench run]
#
# STATE holds the parts that the last piece left in OUT; it may be empty, and it may be OUT. Call it again until it says
# that nothing is left. A piece is killed in the middle of a task: trainings and judgements go on where they were. Black-box
# images do not travel: where one piece cannot craft and judge them all, give it some, --set threats.blackbox.eps=[0.03].
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n 's/^#   //p' "$0" >&2
    exit 2
fi
images=$1 state=$2 out=$3 minutes=${4:-8}
shift $(($# < 4 ? $# : 4))
here=$(cd "$(dirname "$0")/.." && pwd)
work=$here/build/cifar10-jpeg
part=$((15 << 20)) parts=8

mkdir -p "$work/images" "$work/study" "$out"
[ -d "$work/images/test" ] || tar -xJf "$images" -C "$work/images"
if compgen -G "$state/state.tar.*" > /dev/null; then
    cat "$state"/state.tar.* | tar -x -C "$work"
fi
cd "$here"
code=0
timeout --signal=KILL "$((60 * minutes))" robench run benchmarks/cifar10_jpeg.toml \
    --out "$work/study" --data-dir "$work" "$@" || code=$?
# In a folder of its own first: a piece that is cut off here leaves the last one's parts whole.
rm -rf "$work/parts" && mkdir "$work/parts"
tar -c -C "$work" --exclude .crafted --exclude '*.tmp' study | split -b "$part" -d - "$work/parts/state.tar."
made=$(find "$work/parts" -type f | wc -l)
rm -f "$out"/state.tar.*
mv "$work"/parts/state.tar.* "$out"
[ "$made" -le "$parts" ] || echo "state takes $made parts of 15 MiB: more than $parts may not come back" >&2
case $code in
    0) echo "nothing is left: $work/study/report/report.html" ;;
    137) echo "out of time; run the same command again" >&2 ;;
    *) exit "$code" ;;
esac
