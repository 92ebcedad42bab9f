# The room of the store in etcd: what lies under its prefix (entries), etcd's gateway, the store itself.
