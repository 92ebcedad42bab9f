/* stream: counted streams, to measure loss and gaps. Owns one socket and nothing else.
 *   stream send ADDR PORT RATE SECONDS      UDP datagrams numbered from 0; prints: sent N
 *   stream recv PORT SECONDS                prints: received N lost N longest_gap_ms X   (ends SECONDS after its start)
 *   stream tcp ADDR PORT SECONDS [MS]       a TCP flow to an echo server, one numbered line every MS (5);
 *                                        prints: sent N echoed N longest_gap_ms X broken yes|no
 * SIGTERM ends each early: what is under way is waited for, then it prints.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <unistd.h>
#include "tools.h"

enum { QUIET_MS = 300, ECHO_MS = 3000 };
static volatile sig_atomic_t stopped;

static void stop(int number)
{
    (void)number;
    stopped = 1;
}

static int dial(const char *address, const char *port, int type)
{
    struct sockaddr_storage to;
    socklen_t length;
    int family = parse_address(address, atoi(port), &to, &length);
    if (!family) { fprintf(stderr, "stream: not an address: %s\n", address); exit(2); }
    int s = socket(family, type, 0);
    struct timeval limit = {.tv_sec = 3};
    setsockopt(s, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    if (s < 0 || connect(s, (void *)&to, length) < 0) { perror("stream: connect"); exit(1); }
    return s;
}

static int send_stream(const char *address, const char *port, double rate, double seconds)
{
    int s = dial(address, port, SOCK_DGRAM);
    double start = now_ms();
    unsigned total = rate * seconds, i = 0;
    for (; i < total && !stopped; i++) {
        double wait = start + i * 1e3 / rate - now_ms();
        if (wait > 0) usleep(wait * 1e3);
        unsigned number = htonl(i);
        send(s, &number, sizeof number, 0);
    }
    printf("sent %u\n", i);
    return 0;
}

static int receive(int port, double seconds)
{
    struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    int s = socket(AF_INET6, SOCK_DGRAM, 0), no = 0, room = 8 << 20;
    setsockopt(s, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof no);
    if (bind(s, (void *)&any, sizeof any) < 0) { perror("stream: bind"); return 1; }
    setsockopt(s, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room); /* a busy machine is no loss */
    double until = now_ms() + seconds * 1e3, last = 0, longest = 0;
    unsigned received = 0, first = 0, highest = 0, number;
    struct pollfd polled = {.fd = s, .events = POLLIN};
    while (now_ms() < until) {
        int ready = poll(&polled, 1, stopped ? QUIET_MS : 20);
        if (stopped && !ready) break;
        if (ready < 1 || recv(s, &number, sizeof number, 0) != sizeof number) continue;
        double at = now_ms();
        number = ntohl(number);
        if (!received) first = highest = number;
        else if (at - last > longest) longest = at - last;
        if (number > highest) highest = number;
        last = at;
        received++;
    }
    printf("received %u lost %u longest_gap_ms %.1f\n", received, received ? highest - first + 1 - received : 0, longest);
    return 0;
}

static int tcp_stream(const char *address, const char *port, double seconds, double every)
{
    int s = dial(address, port, SOCK_STREAM), broken = 0;
    double start = now_ms(), last = start, longest = 0, next = start;
    long sent = 0, echoed = -1; /* the server's banner is one line too */
    if (atoi(port) == 80) echoed = 0;
    struct pollfd polled = {.fd = s, .events = POLLIN};
    char data[4096];
    double end = start + seconds * 1e3;
    while (!broken && now_ms() < end + ECHO_MS) {
        if (stopped && end > now_ms()) end = now_ms();
        int over = now_ms() >= end;
        if (over && echoed >= sent) break;
        if (!over && now_ms() >= next) {
            int length = snprintf(data, sizeof data, "%ld\n", sent);
            ssize_t n = send(s, data, length, MSG_NOSIGNAL | MSG_DONTWAIT);
            if (n == length) sent++; else if (errno != EAGAIN) broken = 1;
            next += every;
        }
        double wait = over ? QUIET_MS : next - now_ms();
        if (poll(&polled, 1, wait > 1 ? wait : 1) < 1) continue;
        ssize_t n = recv(s, data, sizeof data, 0);
        if (n <= 0) { broken = 1; break; }
        for (ssize_t i = 0; i < n; i++) echoed += data[i] == '\n';
        if (now_ms() - last > longest) longest = now_ms() - last;
        last = now_ms();
    }
    if (now_ms() - last > longest) longest = now_ms() - last; /* a gap that never ended */
    printf("sent %ld echoed %ld longest_gap_ms %.1f broken %s\n", sent, echoed < 0 ? 0 : echoed, longest, broken ? "yes" : "no");
    return broken;
}

int stream(int argc, char **argv)
{
    signal(SIGTERM, stop);
    if (argc == 6 && !strcmp(argv[1], "send")) return send_stream(argv[2], argv[3], atof(argv[4]), atof(argv[5]));
    if (argc == 4 && !strcmp(argv[1], "recv")) return receive(atoi(argv[2]), atof(argv[3]));
    if (argc >= 5 && !strcmp(argv[1], "tcp")) return tcp_stream(argv[2], argv[3], atof(argv[4]), argc > 5 ? atof(argv[5]) : 5);
    fprintf(stderr, "usage: stream send ADDR PORT RATE SECONDS | recv PORT SECONDS | tcp ADDR PORT SECONDS [MS]\n");
    return 2;
}
