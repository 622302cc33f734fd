# deploy/: set-up of a build machine, and installation.
.PHONY: setup install uninstall
## setup: install the packages that deploy/packages.txt names (as root or with sudo)
setup:
	@deploy/setup.sh

INSTALL = install
UNITDIR ?= $(PREFIX)/lib/systemd/system
SYSUSERSDIR ?= $(PREFIX)/lib/sysusers.d
TMPFILESDIR ?= $(PREFIX)/lib/tmpfiles.d
SYSCONFDIR ?= $(if $(filter /usr /usr/local,$(PREFIX)),/etc,$(PREFIX)/etc)

## install: into DESTDIR/PREFIX (default /usr/local): programs, library, headers, man pages, unit, example configuration
install: all
	$(INSTALL) -d $(addprefix $(DESTDIR)$(PREFIX)/,bin lib/pkgconfig include/balancekv share/man/man1 share/man/man8 \
	  share/bash-completion/completions share/doc/balancekvd) $(DESTDIR)$(SYSCONFDIR)/balancekv $(DESTDIR)$(UNITDIR) \
	  $(DESTDIR)$(SYSUSERSDIR) $(DESTDIR)$(TMPFILESDIR)
	$(INSTALL) -m 755 $(BUILD)/bin/balancekvd $(BUILD)/bin/bkv $(DESTDIR)$(PREFIX)/bin
	$(INSTALL) -m 644 $(CLIENT_SO) $(DESTDIR)$(PREFIX)/lib
	ln -sf $(notdir $(CLIENT_SO)) $(DESTDIR)$(PREFIX)/lib/libbalancekv.so.$(SOVERSION)
	ln -sf libbalancekv.so.$(SOVERSION) $(DESTDIR)$(PREFIX)/lib/libbalancekv.so
	sed -e 's|@PREFIX@|$(PREFIX)|g' -e 's|@VERSION@|$(VERSION)|g' client/balancekv.pc.in \
	  >$(DESTDIR)$(PREFIX)/lib/pkgconfig/balancekv.pc
	$(INSTALL) -m 644 $(PUBLIC_HEADERS) $(DESTDIR)$(PREFIX)/include/balancekv
	$(INSTALL) -m 644 deploy/bkv.1 $(DESTDIR)$(PREFIX)/share/man/man1
	$(INSTALL) -m 644 deploy/balancekvd.8 $(DESTDIR)$(PREFIX)/share/man/man8
	$(INSTALL) -m 644 deploy/completion/bkv deploy/completion/balancekvd $(DESTDIR)$(PREFIX)/share/bash-completion/completions
	$(INSTALL) -m 644 proto/balancekv.proto $(wildcard client/examples/*.c) README.md LICENSE $(DESTDIR)$(PREFIX)/share/doc/balancekvd
	$(INSTALL) -m 644 deploy/balancekvd.conf.example $(DESTDIR)$(SYSCONFDIR)/balancekv/balancekvd.conf.example
	sed 's|/usr/bin/balancekvd|$(PREFIX)/bin/balancekvd|' deploy/balancekvd.service >$(DESTDIR)$(UNITDIR)/balancekvd.service
	$(INSTALL) -m 644 deploy/balancekvd.sysusers $(DESTDIR)$(SYSUSERSDIR)/balancekvd.conf
	$(INSTALL) -m 644 deploy/balancekvd.tmpfiles $(DESTDIR)$(TMPFILESDIR)/balancekvd.conf
	@[ -n "$(DESTDIR)" ] || [ "$(SYSCONFDIR)" != /etc ] || ldconfig 2>/dev/null || true

# Rooms append what else is worth having on a host where nothing can be installed: BUNDLE_PROGRAMS += $(BUILD)/tests/...
BUNDLE := $(BUILD)/balancekv-$(VERSION)-x86_64.tar.gz
BUNDLE_PROGRAMS := $(BUILD)/tests/bench $(BUILD)/tests/bench_kernels
.PHONY: bundle bundle-run
## bundle: build/balancekv-VERSION-x86_64.tar.gz, programs and the libraries they need, for hosts where nothing can be installed
bundle: setup
	@$(MAKE) --no-print-directory bundle-run
bundle-run: all
	@$(MAKE) --no-print-directory $(BUNDLE_PROGRAMS)
	@deploy/bundle.sh $(BUILD) $(VERSION) $(BUNDLE) $(BUNDLE_PROGRAMS)
