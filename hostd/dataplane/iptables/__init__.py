# Owns: the second packet filter, for hosts on iptables-legacy: see table.IptablesFilter.
