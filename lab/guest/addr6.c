/* addr6: gives a device an IPv6 address without duplicate address detection (busybox ip knows no "nodad").
 *   addr6 DEV ADDR...     each as /128. Opens one netlink socket and touches nothing else.
 */
#include <linux/if_addr.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <stdio.h>
#include <unistd.h>
#include "tools.h"

static int add(int s, int index, const struct in6_addr *address)
{
    struct { struct nlmsghdr head; struct ifaddrmsg body; struct rtattr local; struct in6_addr address; } ask = {
        .head = {sizeof ask, RTM_NEWADDR, NLM_F_REQUEST | NLM_F_CREATE | NLM_F_REPLACE | NLM_F_ACK, 1, 0},
        .body = {AF_INET6, 128, IFA_F_NODAD, RT_SCOPE_UNIVERSE, index},
        .local = {sizeof(struct rtattr) + sizeof *address, IFA_LOCAL},
        .address = *address,
    };
    struct { struct nlmsghdr head; struct nlmsgerr error; char rest[512]; } answer;
    if (send(s, &ask, sizeof ask, 0) < 0 || recv(s, &answer, sizeof answer, 0) < (ssize_t)sizeof answer.head) return -1;
    return answer.head.nlmsg_type == NLMSG_ERROR ? answer.error.error : 0;
}

int addr6(int argc, char **argv)
{
    int s = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE), index = argc > 2 ? if_nametoindex(argv[1]) : 0, error = 0;
    if (!index) { fprintf(stderr, "usage: addr6 DEV ADDR... (of a device that exists)\n"); return 2; }
    for (int i = 2; i < argc && !error; i++) {
        struct in6_addr address;
        error = inet_pton(AF_INET6, argv[i], &address) == 1 ? add(s, index, &address) : -22;
        if (error) fprintf(stderr, "addr6: %s: %s\n", argv[i], strerror(-error));
    }
    return error != 0;
}
