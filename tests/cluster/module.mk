# tests/cluster/: the simulator of a large cluster, which needs nothing but the pure part of placement, repair plans and xxHash.
CLUSTER_SIM_SRC := $(addprefix tests/cluster/,simulate.c world.c) tests/bench/report.c kernels/status.c \
  proto/placement.c proto/race.c daemon/cluster/move/repair.c daemon/cluster/move/bandwidth.c
CLUSTER_SIM_OBJ := $(CLUSTER_SIM_SRC:%.c=$(BUILD)/obj/%.o)
$(BUILD)/obj/tests/cluster/%.o: DEPS_CFLAGS = $(call cflags_of,libxxhash)
$(BUILD)/tests/cluster-sim: $(CLUSTER_SIM_OBJ)
	@mkdir -p $(@D)
	$(call say,LD ,$@)
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(call libs_of,libxxhash) -lm

.PHONY: cluster-sim
## cluster-sim: 1,000 members and 10 M keys through the daemon's placement and repair; writes build/bench/cluster-sim.json
cluster-sim: $(BUILD)/tests/cluster-sim
	@mkdir -p $(BUILD)/bench
	$(BUILD)/tests/cluster-sim --out $(BUILD)/bench/cluster-sim.json

# The real thing: daemons and etcd on hosts of their own (network namespaces, so it takes root), faults, a checker.
.PHONY: test-cluster test-cluster-run
## test-cluster: a pool of NODES daemons (default 5) under load and faults for SECONDS (default 60), from SEED (default 1); and who may do what
test-cluster: setup
	@$(MAKE) --no-print-directory test-cluster-run
test-cluster-run: all
	@BUILD=$(BUILD) PYTHON=$(PYTHON) tests/run.sh cluster
	@BUILD=$(BUILD) PYTHONUNBUFFERED=1 $(PYTHON) tests/cluster/run.py --seconds $(or $(SECONDS),60) --nodes $(or $(NODES),5) \
	  --seed $(or $(SEED),1) $(if $(FAULTS),--faults $(FAULTS))

.PHONY: bench-cluster bench-cluster-run
## bench-cluster: a pool's throughput per core against a daemon alone, and what distance costs; writes build/bench/bench-cluster.json
bench-cluster: setup
	@$(MAKE) --no-print-directory bench-cluster-run
bench-cluster-run: all
	@BUILD=$(BUILD) $(PYTHON) tests/cluster/bench.py $(BENCH)
