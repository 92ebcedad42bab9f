#!/bin/sh
# What busybox udhcpc calls with a lease: owns the v4 address and routes of the guest's eth0.
[ "$1" = bound ] || [ "$1" = renew ] || exit 0
ip addr flush dev "$interface" scope global
ip addr add "$ip/${mask:-32}" dev "$interface"
if [ -n "$staticroutes" ]; then
  set -- $staticroutes
  while [ $# -ge 2 ]; do
    if [ "$2" = 0.0.0.0 ]; then ip route replace "$1" dev "$interface"; else ip route replace "$1" via "$2" dev "$interface" onlink; fi
    shift 2
  done
else
  for r in $router; do ip route replace "$r" dev "$interface"; ip route replace default via "$r" dev "$interface"; done
fi
