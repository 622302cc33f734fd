// options.h - every option of balancekvd, declared once: config file key, flag, default, whether SIGHUP reloads it, help.
//
// X(section, name, TYPE, default, reloadable, help)   flag --name-with-dashes, file key name in [section]
// TYPEs: STRING, BOOL, U32, SIZE (bytes with K, M, G, T suffix, powers of 1024), MS (milliseconds; s, m, h suffixes allowed)
#ifndef BKV_OPTIONS_H
#define BKV_OPTIONS_H

#define BKV_OPTIONS(X)                                                                                                         \
    X(listen, socket, STRING, "/run/balancekv/balancekvd.sock", false, "unix socket to listen on; empty: none")                \
    X(listen, socket_mode, STRING, "0660", false, "its permissions, octal")                                                    \
    X(listen, tcp, STRING, "127.0.0.1:7420", false,                                                                            \
      "host:port to listen on; empty: none. An address that is not loopback needs TLS (or insecure = yes)")                    \
    X(listen, insecure, BOOL, "no", false, "allow plain TCP on an address that is not loopback")                               \
    X(listen, tls_cert, STRING, "", false, "PEM certificate chain of this daemon; turns TLS on for tcp")                       \
    X(listen, tls_key, STRING, "", false, "PEM private key")                                                                   \
    X(listen, tls_client_ca, STRING, "", false, "PEM CAs: clients must present a certificate of theirs (mTLS)")                \
    X(memory, arena, SIZE, "1G", false, "memory for summaries")                                                                \
    X(memory, slab, SIZE, "0", false, "slab size, also the largest record; 0: arena / 32, between 8M and 1G")                  \
    X(memory, arena_path, STRING, "", false,                                                                                   \
      "file on tmpfs or hugetlbfs that keeps the summaries across restarts; empty: memfd, handed to systemd")                  \
    X(memory, prefault, BOOL, "no", false, "touch all of the arena at start")                                                  \
    X(memory, max_entries, U32, "0", false, "most records; 0: arena / 16K")                                                    \
    X(memory, staging, SIZE, "256M", false, "memory for payloads on their way to a codec")                                     \
    X(memory, tenant_quota, SIZE, "0", true, "bytes a tenant may hold; 0: no limit. [tenant NAME] quota overrides")            \
    X(memory, ttl, MS, "0", true, "time to live of blocks that give none; 0: until evicted")                                   \
    X(compute, backend, STRING, "auto", false, "kernels: auto (the best that this CPU has), ref, avx2, avx512, amx or cuda")   \
    X(compute, threads, U32, "0", false, "compute threads; 0: one per CPU")                                                    \
    X(compute, max_jobs, U32, "1024", false, "blocks waiting for a compute thread; beyond it UNAVAILABLE")                     \
    X(compute, gpu_cache, SIZE, "0", false, "GPU memory for records that Attend reads there; 0: Attend runs on the CPU")       \
    X(limits, rpc_threads, U32, "0", false, "threads that serve gRPC completion queues; 0: one for every 4 CPUs, at most 8")   \
    X(limits, max_calls, U32, "4096", false, "calls in flight; beyond it UNAVAILABLE")                                         \
    X(limits, max_message, SIZE, "80M", false, "largest single gRPC message")                                                  \
    X(limits, max_block, SIZE, "256M", false, "largest payload of one block")                                                  \
    X(limits, max_batch, U32, "4096", false, "most keys or blocks in one call")                                                \
    X(limits, max_specs, U32, "1024", false, "most specs open at once")                                                        \
    X(limits, op_timeout, MS, "30s", true, "deadline of calls that bring none, and the longest any may have")                  \
    X(limits, drain_timeout, MS, "10s", true, "how long SIGTERM waits for calls in flight")                                    \
    X(transport, shm, SIZE, "1G", false, "most memory shared with local clients, all together; 0: none")                       \
    X(transport, shm_window, SIZE, "256M", false, "most memory shared with one of them")                                       \
    X(transport, cuda_ipc, BOOL, "yes", false, "take blocks straight from local workers' GPU memory, where there is a GPU")    \
    X(transport, verbs, STRING, "auto", false, "RDMA device: auto (the first with an active port), off, or a name")            \
    X(transport, verbs_port, U32, "0", false, "its port; 0: the first active one")                                             \
    X(transport, verbs_gid, STRING, "auto", false, "index in the port's GID table, or auto")                                   \
    X(transport, verbs_sessions, U32, "256", false, "most RDMA clients at once")                                               \
    X(transport, max_sessions, U32, "1024", false, "most clients that share memory at once")                                   \
    X(transport, idle, MS, "5m", false, "when a client that shares memory and asks for nothing is given up")                   \
    X(cluster, etcd, STRING, "", false,                                                                                        \
      "etcd to join a cluster through: host:port, host:port, ...; empty: this daemon runs alone")                              \
    X(cluster, cluster_name, STRING, "balancekv", false, "the cluster's name, its place in etcd")                              \
    X(cluster, node, STRING, "", false, "this daemon's name in it, unique and lasting; empty: the host's name")                \
    X(cluster, advertise, STRING, "", false, "host:port at which other daemons and clients reach this one; empty: listen.tcp") \
    X(cluster, domain, STRING, "", false, "failure domain, such as the rack: a block's replicas lie in different ones")        \
    X(cluster, replicas, U32, "2", false, "daemons that hold each block; the first to join decides for all")                   \
    X(cluster, weight, U32, "0", false, "share of the blocks against other daemons; 0: one for each 64M of the arena")         \
    X(cluster, hot_copies, U32, "2", true,                                                                                     \
      "reads of another daemon's block, within a while, after which a copy stays; 0: none")                                    \
    X(cluster, owns, BOOL, "yes", false, "no: hold no blocks of the pool, only serve the workers of this host")                \
    X(cluster, lease, MS, "5s", false, "after which silence others take this daemon for gone")                                 \
    X(cluster, peer_timeout, MS, "1s", false, "after which another daemon that is silent is passed over for a while")          \
    X(cluster, repair_delay, MS, "10s", true, "how long members must stay as they are before blocks are moved for them")       \
    X(cluster, repair_rate, SIZE, "256M", true, "most bytes a second to send other daemons for repair; 0: no limit")           \
    X(cluster, peer_name, STRING, "balancekvd", false, "DNS name in the certificates of all daemons, and of nobody else")      \
    X(cluster, peer_ca, STRING, "", false, "PEM CAs of their certificates; empty: listen.tls_client_ca")                       \
    X(cluster, etcd_ca, STRING, "", false, "PEM CAs of etcd's certificate; turns TLS to etcd on")                              \
    X(cluster, etcd_cert, STRING, "", false, "PEM certificate for etcd")                                                       \
    X(cluster, etcd_key, STRING, "", false, "its private key")                                                                 \
    X(cluster, etcd_name, STRING, "", false, "name in etcd's certificate; empty: the endpoint's host")                         \
    X(cluster, etcd_user, STRING, "", false, "user to log in to etcd as; empty: none")                                         \
    X(cluster, etcd_password_file, STRING, "", false, "file with that user's password")                                        \
    X(log, target, STRING, "auto", false, "auto (journald under systemd, else text), journald, text or json")                  \
    X(log, level, STRING, "info", true, "error, warn, info or debug")

// Tenants: [tenant NAME] sections, each with `quota = SIZE` (reloadable).

#endif
