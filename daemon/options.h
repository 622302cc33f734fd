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
    X(log, target, STRING, "auto", false, "auto (journald under systemd, else text), journald, text or json")                  \
    X(log, level, STRING, "info", true, "error, warn, info or debug")

// Tenants: [tenant NAME] sections, each with `quota = SIZE` (reloadable).

#endif
