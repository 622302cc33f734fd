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
