#!/bin/sh
# A stand-in for TFLite's benchmark_model. THE REAL BINARY HAS NOT RUN HERE: this prints its recorded formats, with
# other numbers each time, and fails as it would. What it does is a word in the file `mode` beside it, and what the
# model answers comes from a program `answer` beside it: MODEL INPUT OUTPUT.
mode=$(cat mode 2>/dev/null)
count=$(($(cat count 2>/dev/null || echo 0) + 1)); echo $count >count
graph= runs=50 memory= gpu= full= values= output= profile=
for flag; do
  echo "$flag" >>flags
  case $flag in
    --graph=*) graph=${flag#*=} ;;
    --num_runs=*) runs=${flag#*=} ;;
    --report_peak_memory_footprint=true) memory=1 ;;
    --use_gpu=true) gpu=1 ;;
    --require_full_delegation=true) full=1 ;;
    --input_layer_value_files=*) values=${flag##*:} ;;
    --output_filepath=*) output=${flag#*=} ;;
    --op_profiling_output_file=*) profile=${flag#*=} ;;
  esac
done
echo "INFO: STARTING!"
echo "INFO: Log parameter values verbosely: [0]"
[ "$mode" = old ] && [ "$output" ] && echo "WARN: Unconsumed cmdline flags: --output_filepath=$output" && output=
if [ "$mode" = refuse ] || [ "$(dd if="$graph" bs=1 skip=4 count=4 2>/dev/null)" != TFL3 ]; then
  echo "ERROR: Failed to load model $graph"
  echo "ERROR: Benchmarking failed."
  exit 1
fi
echo "INFO: Loaded model $graph"
if [ "$gpu" ]; then
  case $mode in
    partial)
      echo "INFO: Explicitly applied GPU delegate, and the model graph will be partially executed by the delegate w/ 3 delegate kernels."
      [ "$full" ] && echo "ERROR: Disallowed CPU fallback detected." && echo "ERROR: Benchmarking failed." && exit 1 ;;
    none) echo "INFO: Though GPU delegate is explicitly applied, the model graph will not be executed by the delegate." ;;
    nogpu) echo "WARN: Unconsumed cmdline flags: --use_gpu=true" ;;
    *) echo "INFO: Explicitly applied GPU delegate, and the model graph will be completely executed by the delegate." ;;
  esac
fi
echo "INFO: Initialized session in $((count + 5)).395ms."
[ "$mode" = crash ] && kill -SEGV $$
[ "$mode" = abort ] && kill -ABRT $$
[ "$mode" = hang ] && exec sleep 300
echo "INFO: count=2 first=3900 curr=3243 min=3243 max=3900 avg=3571.5 std=328"
average=$((2900 + 10 * count))
[ -f "slow-$graph" ] && average=$((average * 11 / 10))
[ "$mode" = backwards ] && average=-$average
if [ "$runs" = 1 ] || [ "$mode" = one ]; then
  runs=1 stats="count=1 curr=$average"
else
  stats="count=$runs first=2881 curr=2703 min=2605 max=20356 avg=$average std=1190"
  [ "$mode" = plain ] || stats="$stats p5=2647 median=2781 p95=3169"
fi
echo "INFO: $stats"
[ "$mode" = cut ] && exit 0
[ "$profile" ] && cp profile.recorded "$profile"
[ "$output" ] && ./answer "$graph" "$values" "$output"
echo "INFO: Inference timings in us: Init: $((6000 + count)), First inference: 2761, Warmup (avg): 3243.58, Inference (avg): $average"
echo "INFO: Memory footprint delta from the start of the tool (MB): init=39.4531 overall=40.8281"
[ "$memory" ] && echo "INFO: Overall peak memory footprint (MB) via periodic monitoring: 13.1797"
exit 0
