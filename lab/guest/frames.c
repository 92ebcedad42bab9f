/* frames: raw Ethernet frames out of eth0. Opens one AF_PACKET socket and touches nothing else.
 *   frames [-i DEV]                  lines COUNT INTERVAL_US HEXFRAME on stdin; prints one line SENT FAILED for each
 *   frames flood SECONDS HEXFRAME... round and round, from the moment the device exists (at most 60 s)
 */
#include <errno.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include "tools.h"

enum { MAX_FRAME = 2048, MAX_FRAMES = 32, FLOOD_LIMIT_S = 60, FLOOD_GAP_US = 200 };

static int unhex(const char *text, unsigned char *out)
{
    int length = 0, high, low, used = 0;
    for (; *text && *text != '\n' && length < MAX_FRAME; text += 2, length++) {
        if (sscanf(text, "%1x%1x%n", &high, &low, &used) != 2 || used != 2) return -1;
        out[length] = high << 4 | low;
    }
    return length;
}

/* A packet socket bound to DEV, which is waited for and set up; -1 after WAIT_MS. */
static int open_device(const char *dev, double wait_ms)
{
    double until = now_ms() + wait_ms;
    int s = socket(AF_PACKET, SOCK_RAW, 0);
    struct ifreq request = {0};
    strncpy(request.ifr_name, dev, IFNAMSIZ - 1);
    while (s >= 0 && ioctl(s, SIOCGIFFLAGS, &request) < 0) {
        if (now_ms() > until) return -1;
        usleep(1000);
    }
    if (s < 0) return -1;
    request.ifr_flags |= IFF_UP;
    ioctl(s, SIOCSIFFLAGS, &request);
    struct sockaddr_ll address = {.sll_family = AF_PACKET, .sll_ifindex = if_nametoindex(dev)};
    return bind(s, (void *)&address, sizeof address) < 0 ? -1 : s;
}

static int flood(const char *dev, int argc, char **argv)
{
    static unsigned char frame[MAX_FRAMES][MAX_FRAME];
    int length[MAX_FRAMES], count = 0, limit = atoi(argv[1]);
    for (int i = 2; i < argc && count < MAX_FRAMES; i++, count++)
        if ((length[count] = unhex(argv[i], frame[count])) < 14) { fprintf(stderr, "frames: bad hex: %s\n", argv[i]); return 2; }
    int s = open_device(dev, 1e3 * FLOOD_LIMIT_S);
    if (s < 0) { perror("frames: device"); return 1; }
    double until = now_ms() + 1e3 * (limit < FLOOD_LIMIT_S ? limit : FLOOD_LIMIT_S);
    long sent = 0;
    for (int i = 0; now_ms() < until; i = (i + 1) % count) {
        if (send(s, frame[i], length[i], MSG_DONTWAIT) > 0) sent++;
        usleep(FLOOD_GAP_US);
    }
    printf("sent %ld\n", sent);
    return 0;
}

int frames(int argc, char **argv)
{
    const char *dev = "eth0";
    static char line[2 * MAX_FRAME + 64], hex[2 * MAX_FRAME + 64];
    static unsigned char frame[MAX_FRAME];
    if (argc > 2 && !strcmp(argv[1], "-i")) { dev = argv[2]; argv += 2; argc -= 2; }
    if (argc > 3 && !strcmp(argv[1], "flood")) return flood(dev, argc - 1, argv + 1);
    if (argc > 1) { fprintf(stderr, "usage: frames [-i DEV] [flood SECONDS HEXFRAME...]\n"); return 2; }
    int s = open_device(dev, 5000), bad = 0;
    if (s < 0) { perror("frames: device"); return 1; }
    while (fgets(line, sizeof line, stdin)) {
        long count, gap, sent = 0, failed = 0;
        int length = sscanf(line, "%ld %ld %4150s", &count, &gap, hex) == 3 ? unhex(hex, frame) : -1;
        if (length < 14) { fprintf(stderr, "frames: want COUNT INTERVAL_US HEXFRAME\n"); bad = 2; continue; }
        for (long i = 0; i < count; i++) {
            if (send(s, frame, length, 0) == length) sent++; else failed++;
            if (gap) usleep(gap);
        }
        printf("%ld %ld\n", sent, failed);
    }
    return bad;
}
