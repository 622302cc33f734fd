// etcd_server.c - see etcd_server.h.
#include "etcd_server.h"

#include <arpa/inet.h>
#include <criterion/criterion.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

int silent_endpoint(int *port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof(address);
    cr_assert(fd >= 0 && bind(fd, (struct sockaddr *)(void *)&address, sizeof(address)) == 0 && listen(fd, 64) == 0 &&
              getsockname(fd, (struct sockaddr *)(void *)&address, &length) == 0);
    *port = ntohs(address.sin_port);
    return fd;
}

int free_port(void) {
    int port;
    close(silent_endpoint(&port));
    return port;
}

void etcd_server_init(etcd_server_t *server) {
    *server = (etcd_server_t){.port = free_port(), .peer_port = free_port()};
    snprintf(server->folder, sizeof(server->folder), "/tmp/bkv-etcd-XXXXXX");
    cr_assert_not_null(mkdtemp(server->folder));
    snprintf(server->endpoint, sizeof(server->endpoint), "127.0.0.1:%d", server->port);
}

// Short elections, so that a single etcd is there at once and leases of one second are possible.
static void run_etcd(const etcd_server_t *server) {
    static char data[80], client[48], peer[48], cluster[64], quota[48], ca[96], cert[96], key[96];
    snprintf(data, sizeof(data), "%s/data", server->folder);
    snprintf(client, sizeof(client), "%s://127.0.0.1:%d", server->tls ? "https" : "http", server->port);
    snprintf(peer, sizeof(peer), "http://127.0.0.1:%d", server->peer_port);
    snprintf(cluster, sizeof(cluster), "test=%s", peer);
    snprintf(quota, sizeof(quota), "--quota-backend-bytes=%llu", (unsigned long long)server->quota_bytes);
    snprintf(ca, sizeof(ca), "--trusted-ca-file=%s/ca.pem", server->folder);
    snprintf(cert, sizeof(cert), "--cert-file=%s/server.pem", server->folder);
    snprintf(key, sizeof(key), "--key-file=%s/server.key", server->folder);
    char *arguments[] = {"etcd",
                         "--name",
                         "test",
                         "--data-dir",
                         data,
                         "--listen-client-urls",
                         client,
                         "--advertise-client-urls",
                         client,
                         "--listen-peer-urls",
                         peer,
                         "--initial-advertise-peer-urls",
                         peer,
                         "--initial-cluster",
                         cluster,
                         "--heartbeat-interval=20",
                         "--election-timeout=200",
                         quota,
                         server->tls ? ca : NULL,
                         cert,
                         key,
                         "--client-cert-auth",
                         NULL};
    char log[80];
    snprintf(log, sizeof(log), "%s/log", server->folder);
    int fd = open(log, O_WRONLY | O_CREAT | O_APPEND, 0600);
    dup2(fd, 1);
    dup2(fd, 2);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    execvp("etcd", arguments);
    _exit(127);
}

void etcd_server_start(etcd_server_t *server) {
    cr_assert_eq(server->pid, 0);
    server->pid = fork();
    cr_assert(server->pid >= 0);
    if (server->pid == 0) {
        run_etcd(server);
    }
}

void etcd_server_kill(etcd_server_t *server) {
    if (server->pid != 0) {
        kill(server->pid, SIGKILL);
        waitpid(server->pid, NULL, 0);
        server->pid = 0;
    }
}

void etcd_server_stop(etcd_server_t *server) {
    kill(server->pid, SIGSTOP);
    cr_assert_eq(waitpid(server->pid, NULL, WUNTRACED), server->pid);
}

void etcd_server_continue(etcd_server_t *server) {
    kill(server->pid, SIGCONT);
}

static int run_shell(const char *command) {
    int status = system(command);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

void etcd_server_wipe(etcd_server_t *server) {
    char command[128];
    cr_assert_eq(server->pid, 0);
    snprintf(command, sizeof(command), "rm -rf %s/data", server->folder);
    cr_assert_eq(run_shell(command), 0);
}

void etcd_server_clear(etcd_server_t *server) {
    char command[128];
    etcd_server_kill(server);
    snprintf(command, sizeof(command), "rm -rf %s", server->folder);
    cr_assert_eq(run_shell(command), 0);
}

void etcd_server_control(const etcd_server_t *server, const char *arguments) {
    char command[512];
    int status = -1;
    const char *f = server->folder;
    if (server->tls) {
        snprintf(command, sizeof(command),
                 "ETCDCTL_API=3 etcdctl --endpoints=https://%s --cacert=%s/ca.pem --cert=%s/client.pem --key=%s/client.key %s "
                 ">>%s/log 2>&1",
                 server->endpoint, f, f, f, arguments, f);
    } else {
        snprintf(command, sizeof(command), "ETCDCTL_API=3 etcdctl --endpoints=http://%s %s >>%s/log 2>&1", server->endpoint,
                 arguments, f);
    }
    for (int i = 0; i < 100 && status != 0; i++) {
        status = run_shell(command);
        if (status != 0) {
            nanosleep(&(struct timespec){.tv_nsec = 200000000}, NULL);
        }
    }
    cr_assert_eq(status, 0, "%s", command);
}

static void sign(const etcd_server_t *server, const char *name, const char *extension) {
    char command[1024];
    const char *f = server->folder;
    snprintf(
        command, sizeof(command),
        "cd %s && openssl req -newkey rsa:2048 -nodes -keyout %s.key -subj /CN=%s -out %s.csr 2>>log && printf '%s' >%s.ext && "
        "openssl x509 -req -in %s.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 1 -extfile %s.ext -out %s.pem 2>>log",
        f, name, name, name, extension, name, name, name, name);
    cr_assert_eq(run_shell(command), 0, "%s", command);
}

void etcd_server_certificates(etcd_server_t *server) {
    char command[512];
    for (int other = 0; other < 2; other++) {
        const char *name = other ? "other-ca" : "ca";
        snprintf(command, sizeof(command),
                 "cd %s && openssl req -x509 -newkey rsa:2048 -nodes -keyout %s.key -subj /CN=%s -days 1 -out %s.pem 2>>log",
                 server->folder, name, name, name);
        cr_assert_eq(run_shell(command), 0, "%s", command);
    }
    sign(server, "server", "subjectAltName=IP:127.0.0.1\\nextendedKeyUsage=serverAuth,clientAuth");
    sign(server, "client", "extendedKeyUsage=clientAuth");
    server->tls = true;
}
