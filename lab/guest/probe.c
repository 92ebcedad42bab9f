/* probe: which of ICMP echo, tcp and (with -u) udp ports answer at each address, all asked at once.
 *   probe [-t MILLISECONDS] [-p PORT,PORT...] [-u PORT,PORT...] ADDR...
 * prints ADDR icmp|PORT|udp/PORT yes|no. Owns its sockets and nothing else.
 */
#include <errno.h>
#include <fcntl.h>
#include <netinet/icmp6.h>
#include <netinet/ip_icmp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include "tools.h"

enum { MAX_ASKED = 1000 };
enum kind { ICMP, TCP, UDP };
struct asked { const char *address; enum kind kind; int port, family, answered, done; struct sockaddr_storage to; socklen_t length; };
static struct asked asked[MAX_ASKED];
static struct pollfd polled[MAX_ASKED];
static int used;

static void send_echo(int i)
{
    unsigned char packet[16] = {0};
    packet[0] = asked[i].family == AF_INET ? ICMP_ECHO : ICMP6_ECHO_REQUEST;
    packet[4] = getpid() >> 8; packet[5] = getpid(); packet[6] = i >> 8; packet[7] = i;
    if (asked[i].family == AF_INET) {
        unsigned sum = 0;
        for (int k = 0; k < 16; k += 2) sum += packet[k] << 8 | packet[k + 1];
        sum = (sum & 0xffff) + (sum >> 16); sum = ~(sum + (sum >> 16));
        packet[2] = sum >> 8; packet[3] = sum;
    }
    sendto(polled[i].fd, packet, sizeof packet, MSG_DONTWAIT, (void *)&asked[i].to, asked[i].length);
}

static void ask(const char *address, enum kind kind, int port)
{
    if (used == MAX_ASKED) return;
    struct asked *a = &asked[used];
    *a = (struct asked){.address = address, .kind = kind, .port = port};
    a->family = parse_address(address, kind == ICMP ? 0 : port, &a->to, &a->length);
    if (!a->family) { fprintf(stderr, "probe: not an address: %s\n", address); exit(2); }
    int type = kind == ICMP ? SOCK_RAW : kind == TCP ? SOCK_STREAM : SOCK_DGRAM;
    int protocol = kind != ICMP ? 0 : a->family == AF_INET ? IPPROTO_ICMP : IPPROTO_ICMPV6;
    int s = socket(a->family, type | SOCK_NONBLOCK, protocol);
    if (s < 0) { perror("probe: socket"); exit(1); }
    polled[used].fd = s; polled[used].events = kind == TCP ? POLLOUT : POLLIN;
    int i = used++;
    if (kind == ICMP) send_echo(i);
    else if (connect(s, (void *)&a->to, a->length) < 0 && errno != EINPROGRESS) a->done = 1;
    else if (kind == UDP) send(s, "probe", 5, 0);
}

/* Is this the reply to the echo that was number I? Every raw socket sees every reply: only its own counts. */
static int is_reply(int i, const unsigned char *packet, ssize_t n)
{
    if (asked[i].family == AF_INET) {
        int header = n > 0 ? (packet[0] & 15) * 4 : 0;
        packet += header; n -= header;
    }
    return n >= 8 && packet[0] == (asked[i].family == AF_INET ? ICMP_ECHOREPLY : ICMP6_ECHO_REPLY)
        && (packet[4] << 8 | packet[5]) == (getpid() & 0xffff) && (packet[6] << 8 | packet[7]) == i;
}

static void look(int i)
{
    unsigned char packet[2048];
    struct asked *a = &asked[i];
    if (a->kind == TCP) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(polled[i].fd, SOL_SOCKET, SO_ERROR, &error, &size);
        a->answered = !error; a->done = 1;
        return;
    }
    for (ssize_t n; (n = recv(polled[i].fd, packet, sizeof packet, 0)) > 0;)
        if (a->kind == UDP || is_reply(i, packet, n)) a->answered = a->done = 1;
    if (a->kind == UDP && errno == ECONNREFUSED) a->done = 1;
}

static void ports(const char *address, enum kind kind, const char *list)
{
    for (const char *p = list; p && *p; p = strchr(p, ',') ? strchr(p, ',') + 1 : "") ask(address, kind, atoi(p));
}

int probe(int argc, char **argv)
{
    const char *tcp = "80,5432", *udp = "";
    int option, wait = 1000, again = 0, open = 1;
    while ((option = getopt(argc, argv, "t:p:u:")) != -1) {
        if (option == 't') wait = atoi(optarg);
        else if (option == 'p') tcp = optarg;
        else if (option == 'u') udp = optarg;
        else return 2;
    }
    for (int i = optind; i < argc; i++) {
        ask(argv[i], ICMP, 0);
        ports(argv[i], TCP, tcp);
        ports(argv[i], UDP, udp);
    }
    double start = now_ms();
    while (open && now_ms() - start < wait) {
        poll(polled, used, 20);
        open = 0;
        for (int i = 0; i < used; i++) {
            if (!asked[i].done && polled[i].revents) look(i);
            if (asked[i].done) polled[i].fd = polled[i].fd > 0 ? -polled[i].fd - 1 : polled[i].fd;
            open += !asked[i].done;
        }
        if (!again && now_ms() - start > wait * 0.4) { /* ICMP and UDP have no retransmission of their own */
            again = 1;
            for (int i = 0; i < used; i++)
                if (!asked[i].done && asked[i].kind == ICMP) send_echo(i);
                else if (!asked[i].done && asked[i].kind == UDP) send(polled[i].fd, "probe", 5, 0);
        }
    }
    for (int i = 0; i < used; i++) {
        const char *yes = asked[i].answered ? "yes" : "no";
        if (asked[i].kind == ICMP) printf("%s icmp %s\n", asked[i].address, yes);
        else printf("%s %s%d %s\n", asked[i].address, asked[i].kind == UDP ? "udp/" : "", asked[i].port, yes);
    }
    return 0;
}
