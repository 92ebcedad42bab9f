/* What the guest tools share: their entry points, a clock, and an address parser. */
#ifndef TOOLS_H
#define TOOLS_H
#include <arpa/inet.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

int addr6(int argc, char **argv);
int frames(int argc, char **argv);
int probe(int argc, char **argv);
int stream(int argc, char **argv);
int serve(int argc, char **argv);

static inline double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

/* TEXT as an address with PORT; the address family, or 0 if it is none. */
static inline int parse_address(const char *text, int port, struct sockaddr_storage *out, socklen_t *length)
{
    struct sockaddr_in *v4 = (void *)out;
    struct sockaddr_in6 *v6 = (void *)out;
    memset(out, 0, sizeof *out);
    if (inet_pton(AF_INET, text, &v4->sin_addr) == 1) {
        v4->sin_family = AF_INET; v4->sin_port = htons(port); *length = sizeof *v4;
        return AF_INET;
    }
    if (inet_pton(AF_INET6, text, &v6->sin6_addr) == 1) {
        v6->sin6_family = AF_INET6; v6->sin6_port = htons(port); *length = sizeof *v6;
        return AF_INET6;
    }
    return 0;
}
#endif
