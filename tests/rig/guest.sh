#!/bin/sh
# Runs in L1: cvmm with the given arguments, and around it the host's side of what the guest's tests need.
# NET=1: a tap and a TCP peer. VSOCK=1: both directions over vsock. DISK=MiB: an empty disk.
# EXTRA: shell text to run beside cvmm, its process number in $PID. TIMEOUT: seconds until cvmm is killed; before that,
# where its threads are is written down.
cd /root || exit 1
rm -rf console events err out extra late v v_*
: > console
if [ -n "$NET" ]; then
    [ -d /sys/class/net/tap0 ] || { tunctl -t tap0 && ip addr add 10.9.0.1/24 dev tap0 && ip link set tap0 up; } >out 2>&1
    ./tool serve tcp:10.9.0.1:7000 >net.log 2>&1 &
    set -- "$@" --net tap=tap0
fi
if [ -n "$VSOCK" ]; then
    ./tool serve unix:/root/v_5000 >vsock.log 2>&1 &
    set -- "$@" --vsock cid=42,uds=/root/v
fi
./cvmm run "$@" --events /root/events 2>err &
PID=$!
(
    LEFT=${TIMEOUT:-240}
    while [ $((LEFT -= 2)) -ge 0 ]; do sleep 2; kill -0 $PID || exit; done
    for thread in /proc/$PID/task/*; do
        echo "$(cat $thread/comm), ticks $(cut -d' ' -f14,15 $thread/stat):"
        sed 's/^/  /' $thread/stack
    done >late
    kill -KILL $PID
) >/dev/null 2>&1 &
if [ -n "$VSOCK" ]; then
    (
        while ! grep -q CVMM-LISTENING console && kill -0 $PID; do sleep 0.3; done
        ./tool connect hybrid:/root/v:6000 16
    ) >listen.log 2>&1 &
fi
if [ -n "$EXTRA" ]; then
    # Waits until the console, or another file, shows the text so many times; fails when cvmm ends before.
    await() {
        until [ "$(cat "${3:-console}" 2>/dev/null | grep -c "$1")" -ge "${2:-1}" ]; do
            kill -0 $PID 2>/dev/null || return 1
            sleep 0.3
        done
    }
    (eval "$EXTRA") >extra 2>&1 &
    BESIDE=$!
fi
wait $PID
CODE=$?
[ -n "$EXTRA" ] && wait $BESIDE
killall tool 2>/dev/null
touch events extra late err
for part in console events extra late; do echo "=== $part"; cat $part; echo; done | sed '/^$/d'
echo "=== stderr"
cat err
echo "=== code"
echo $CODE
