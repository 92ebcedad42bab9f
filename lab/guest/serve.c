/* serve: tcp and udp servers on every given port, v4 and v6. TCP: the host name as a banner (not on port 80), then an
 * echo; on port 80 a GET is answered by HTTP with the host name. UDP: an echo. Owns its sockets and nothing else.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include "tools.h"

enum { MAX_PORTS = 16, MAX_SOCKETS = 1024 };
static struct pollfd polled[MAX_SOCKETS];
static int port_of[MAX_SOCKETS], kind[MAX_SOCKETS]; /* kind: 0 listener, 1 udp, 2 connection */
static int used;
static char host[72];

static void add(int fd, int port, int what)
{
    if (fd < 0 || used == MAX_SOCKETS) { if (fd >= 0) close(fd); return; }
    polled[used] = (struct pollfd){.fd = fd, .events = POLLIN};
    port_of[used] = port; kind[used++] = what;
}

static int listener(int port, int type)
{
    int yes = 1, no = 0, s = socket(AF_INET6, type | SOCK_NONBLOCK, 0);
    struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    if (s < 0) return -1;
    setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    setsockopt(s, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof no);
    if (type == SOCK_DGRAM) { /* answer from the address that was asked, not from the first of eth0 */
        setsockopt(s, IPPROTO_IPV6, IPV6_RECVPKTINFO, &yes, sizeof yes);
        setsockopt(s, IPPROTO_IP, IP_PKTINFO, &yes, sizeof yes);
    }
    if (bind(s, (void *)&any, sizeof any) < 0 || (type == SOCK_STREAM && listen(s, 128) < 0)) {
        perror("serve"); close(s); return -1;
    }
    return s;
}

static void echo_datagram(int s)
{
    char data[2048], control[256];
    struct sockaddr_in6 from;
    struct iovec part = {data, sizeof data};
    struct msghdr message = {&from, sizeof from, &part, 1, control, sizeof control, 0};
    ssize_t n = recvmsg(s, &message, 0);
    if (n < 0) return;
    part.iov_len = n;
    if (sendmsg(s, &message, 0) < 0) { message.msg_control = NULL; message.msg_controllen = 0; sendmsg(s, &message, 0); }
}

/* One readable connection: 0 when it is over. */
static int talk(int s, int port)
{
    char data[4096], reply[256];
    ssize_t n = read(s, data, sizeof data);
    if (n < 0 && errno == EAGAIN) return 1;
    if (n <= 0) return 0;
    if (port == 80 && n > 4 && !memcmp(data, "GET ", 4)) {
        int length = snprintf(reply, sizeof reply, "HTTP/1.0 200 OK\r\nContent-Length: %zu\r\n\r\n%s", strlen(host), host);
        send(s, reply, length, MSG_NOSIGNAL);
        return 0;
    }
    return send(s, data, n, MSG_NOSIGNAL) == n;
}

int serve(int argc, char **argv)
{
    gethostname(host, 64);
    strcat(host, "\n");
    for (int i = 1; i < argc && i <= MAX_PORTS; i++) {
        add(listener(atoi(argv[i]), SOCK_STREAM), atoi(argv[i]), 0);
        add(listener(atoi(argv[i]), SOCK_DGRAM), atoi(argv[i]), 1);
    }
    if (!used) { fprintf(stderr, "usage: serve PORT...\n"); return 2; }
    while (poll(polled, used, -1) >= 0 || errno == EINTR) {
        for (int i = used - 1; i >= 0; i--) {
            if (!polled[i].revents) continue;
            if (kind[i] == 1) echo_datagram(polled[i].fd);
            else if (kind[i] == 0) {
                int s = accept4(polled[i].fd, NULL, NULL, SOCK_NONBLOCK);
                if (s >= 0 && port_of[i] != 80) send(s, host, strlen(host), MSG_NOSIGNAL);
                add(s, port_of[i], 2);
            } else if (!talk(polled[i].fd, port_of[i])) {
                close(polled[i].fd);
                used--;
                polled[i] = polled[used]; port_of[i] = port_of[used]; kind[i] = kind[used];
            }
        }
    }
    return 1;
}
