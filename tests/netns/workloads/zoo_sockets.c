/* Sockets other than TCP. */
#include "zoo.h"
#include <linux/filter.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>

static int fds[8];
static char text[70000];

static struct sockaddr_in four(const char *address, int port)
{
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    unsigned a, b, c, d;
    CHECK(sscanf(address, "%u.%u.%u.%u", &a, &b, &c, &d) == 4, "%s", address);
    name.sin_addr.s_addr = htonl(a << 24 | b << 16 | c << 8 | d);
    return name;
}

static int udp_at(const char *address, int port)
{
    struct sockaddr_in name = four(address, port);
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)&name, sizeof name) == 0, "udp at %s:%d", address, port);
    return fd;
}

static int option(int fd, int level, int which)
{
    int value = -1;
    socklen_t length = sizeof value;
    CHECK(getsockopt(fd, level, which, &value, &length) == 0, "option %d %d", level, which);
    return value;
}

static void set(int fd, int level, int which, int value)
{
    CHECK(setsockopt(fd, level, which, &value, sizeof value) == 0, "option %d %d", level, which);
}

/* Unread datagrams of two senders, one of them connected, with the empty and the long one. */
static const int sizes[] = {5, 0, 60000, 1};

static void udp_send(void)
{
    struct sockaddr_in to = four("127.0.0.1", 4300);
    for (int i = 0; i < 4; i++) {
        memset(text, 'a' + i, sizeof text);
        ssize_t sent = i % 2 ? send(fds[1], text, (size_t)sizes[i], 0)
                             : sendto(fds[2], text, (size_t)sizes[i], 0, (struct sockaddr *)&to, sizeof to);
        CHECK(sent == sizes[i], "send %d", i);
    }
}
static void udp_prepare(void)
{
    struct sockaddr_in to = four("127.0.0.1", 4300);
    fds[0] = udp_at("127.0.0.1", 4300);
    set(fds[0], IPPROTO_IP, IP_TOS, 16);
    set(fds[0], IPPROTO_IP, IP_RECVTTL, 1);
    set(fds[0], SOL_SOCKET, SO_RCVBUF, 300000);
    fds[1] = udp_at("127.0.0.1", 4301);
    CHECK(connect(fds[1], (struct sockaddr *)&to, sizeof to) == 0, "connect");
    fds[2] = udp_at("0.0.0.0", 4302);
    set(fds[2], IPPROTO_IP, IP_TTL, 9);
    udp_send();
}
static void udp_fully(void)
{
    char control[64];
    for (int i = 0; i < 4; i++) {
        struct sockaddr_in from;
        struct iovec part = {text, sizeof text};
        struct msghdr message = {.msg_name = &from, .msg_namelen = sizeof from, .msg_iov = &part, .msg_iovlen = 1,
                                 .msg_control = control, .msg_controllen = sizeof control};
        ssize_t got = recvmsg(fds[0], &message, 0);
        CHECK(got == sizes[i] && (got == 0 || text[got - 1] == 'a' + i), "datagram %d: %zd", i, got);
        CHECK(from.sin_port == htons(i % 2 ? 4301 : 4302), "sender of %d", i);
        CHECK(from.sin_addr.s_addr == htonl(INADDR_LOOPBACK), "address of %d", i);
        struct cmsghdr *ttl = CMSG_FIRSTHDR(&message);
        CHECK(ttl && ttl->cmsg_type == IP_TTL && *CMSG_DATA(ttl) == (i % 2 ? 64 : 9), "time to live of %d", i);
    }
    CHECK(recv(fds[0], text, sizeof text, 0) < 0 && errno == EAGAIN, "one too many");
    CHECK(option(fds[0], IPPROTO_IP, IP_TOS) == 16 && option(fds[0], SOL_SOCKET, SO_RCVBUF) == 600000, "options");
    udp_send();
}

/* An IPv6 socket that hears both families. */
static void six_send(void)
{
    struct sockaddr_in to4 = four("127.0.0.1", 4310);
    struct sockaddr_in6 to6 = {.sin6_family = AF_INET6, .sin6_port = htons(4310), .sin6_addr = in6addr_loopback};
    CHECK(sendto(fds[1], "four", 4, 0, (struct sockaddr *)&to4, sizeof to4) == 4, "send");
    CHECK(sendto(fds[2], "sixsix", 6, 0, (struct sockaddr *)&to6, sizeof to6) == 6, "send");
}
static void six_prepare(void)
{
    struct sockaddr_in6 name = {.sin6_family = AF_INET6, .sin6_port = htons(4310)};
    fds[0] = socket(AF_INET6, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    CHECK(bind(fds[0], (struct sockaddr *)&name, sizeof name) == 0, "bind");
    fds[1] = udp_at("127.0.0.1", 4311);
    name.sin6_port = htons(4312);
    fds[2] = socket(AF_INET6, SOCK_DGRAM, 0);
    CHECK(bind(fds[2], (struct sockaddr *)&name, sizeof name) == 0, "bind");
    six_send();
}
static void six_fully(void)
{
    struct sockaddr_in6 from;
    socklen_t length = sizeof from;
    CHECK(recvfrom(fds[0], text, 100, 0, (struct sockaddr *)&from, &length) == 4, "four");
    CHECK(IN6_IS_ADDR_V4MAPPED(&from.sin6_addr) && from.sin6_port == htons(4311), "mapped sender");
    CHECK(recvfrom(fds[0], text, 100, 0, (struct sockaddr *)&from, &length) == 6, "six");
    CHECK(IN6_IS_ADDR_LOOPBACK(&from.sin6_addr) && from.sin6_port == htons(4312), "sender");
    six_send();
}

/* Sends to a group by a device that it is told by its number alone; no route leads there otherwise. */
static int by_number(const char *device)
{
    struct ip_mreqn choice = {.imr_ifindex = (int)if_nametoindex(device)};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    CHECK(setsockopt(fd, IPPROTO_IP, IP_MULTICAST_IF, &choice, sizeof choice) == 0, "number of %s", device);
    return fd;
}

/* A group on each device; another socket of the same port has joined neither. */
static void group_prepare(void)
{
    struct ip_mreqn group = {.imr_ifindex = (int)if_nametoindex("lo")};
    group.imr_multiaddr = four("239.7.7.7", 0).sin_addr;
    for (int i = 0; i < 2; i++) {
        struct sockaddr_in name = four("0.0.0.0", 4320);
        fds[i] = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
        set(fds[i], SOL_SOCKET, SO_REUSEADDR, 1);
        set(fds[i], IPPROTO_IP, IP_MULTICAST_ALL, 0);
        CHECK(bind(fds[i], (struct sockaddr *)&name, sizeof name) == 0, "bind");
    }
    CHECK(setsockopt(fds[0], IPPROTO_IP, IP_ADD_MEMBERSHIP, &group, sizeof group) == 0, "join");
    group = (struct ip_mreqn){.imr_ifindex = (int)if_nametoindex("eth0")};
    group.imr_multiaddr = four("239.7.7.8", 0).sin_addr;
    CHECK(setsockopt(fds[0], IPPROTO_IP, IP_ADD_MEMBERSHIP, &group, sizeof group) == 0, "join");
    fds[3] = by_number("lo");
    fds[4] = by_number("eth0");
    fds[2] = udp_at("127.0.0.1", 4321);
    struct in_addr device = four("127.0.0.1", 0).sin_addr;
    CHECK(setsockopt(fds[2], IPPROTO_IP, IP_MULTICAST_IF, &device, sizeof device) == 0, "device");
}
static void group_fully(void)
{
    for (int i = 2; i < 5; i++) {
        struct sockaddr_in to = four(i < 4 ? "239.7.7.7" : "239.7.7.8", 4320);
        CHECK(sendto(fds[i], "group", 5, 0, (struct sockaddr *)&to, sizeof to) == 5, "send by %d", i);
        CHECK(recv(fds[0], text, 100, 0) == 5, "joined, by %d", i);
        CHECK(recv(fds[1], text, 100, 0) < 0 && errno == EAGAIN, "not joined");
    }
}

/* A filter that lets no datagram of less than twelve bytes through. */
static void filter_prepare(void)
{
    struct sock_filter code[] = {BPF_STMT(BPF_LD | BPF_W | BPF_LEN, 0), BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, 20, 0, 1),
                                 BPF_STMT(BPF_RET | BPF_K, 0xffff), BPF_STMT(BPF_RET | BPF_K, 0)};
    struct sock_fprog program = {4, code};
    struct sockaddr_in to = four("127.0.0.1", 4330);
    fds[0] = udp_at("127.0.0.1", 4330);
    /* What came before the filter does not go through it. */
    fds[1] = udp_at("127.0.0.1", 4331);
    CHECK(connect(fds[1], (struct sockaddr *)&to, sizeof to) == 0 && send(fds[1], "before", 6, 0) == 6, "send");
    CHECK(setsockopt(fds[0], SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program) == 0, "filter");
    set(fds[0], SOL_SOCKET, SO_LOCK_FILTER, 1);
}
static void filter_fully(void)
{
    static int times;
    if (times++ == 0)
        return;
    if (times == 2)
        CHECK(recv(fds[0], text, 100, 0) == 6, "before the filter");
    CHECK(send(fds[1], "short", 5, 0) == 5 && send(fds[1], "long enough!", 12, 0) == 12, "send");
    CHECK(recv(fds[0], text, 100, 0) == 12, "the long one");
    CHECK(recv(fds[0], text, 100, 0) < 0 && errno == EAGAIN, "the short one");
}

static socklen_t unix_name(struct sockaddr_un *name, const char *what)
{
    memset(name, 0, sizeof *name);
    name->sun_family = AF_UNIX;
    int abstract = what[0] == '@';
    int length = snprintf(name->sun_path + abstract, 100, abstract ? "zoo-%s-%d" : "/run/shared/zoo-%s-%d",
                          what + abstract, getpid());
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + (size_t)length + (size_t)abstract + !abstract);
}

/* A server of streams by path, one of packets by an abstract name: clients come and go. */
static const char *const servers[] = {"server", "@server"};

static void named_prepare(void)
{
    for (int i = 0; i < 2; i++) {
        struct sockaddr_un name;
        socklen_t length = unix_name(&name, servers[i]);
        fds[i] = socket(AF_UNIX, (i ? SOCK_SEQPACKET : SOCK_STREAM) | SOCK_NONBLOCK, 0);
        CHECK(bind(fds[i], (struct sockaddr *)&name, length) == 0 && listen(fds[i], 3) == 0, "listen %d", i);
    }
}
static void named_fully(void)
{
    for (int i = 0; i < 2; i++) {
        struct sockaddr_un name, seen;
        struct ucred peer;
        socklen_t length = unix_name(&name, servers[i]), room = sizeof seen;
        CHECK(getsockname(fds[i], (struct sockaddr *)&seen, &room) == 0, "getsockname");
        CHECK(room == length && memcmp(&seen, &name, length) == 0, "name %d", i);
        int client = socket(AF_UNIX, i ? SOCK_SEQPACKET : SOCK_STREAM, 0);
        CHECK(connect(client, (struct sockaddr *)&name, length) == 0, "connect");
        int served = accept(fds[i], NULL, NULL);
        CHECK(served >= 0 && send(client, "hello", 5, 0) == 5 && recv(served, text, 100, 0) == 5, "hello");
        room = sizeof peer;
        CHECK(getsockopt(client, SOL_SOCKET, SO_PEERCRED, &peer, &room) == 0 && peer.pid == getpid(), "peer");
        close(client);
        close(served);
        CHECK(accept(fds[i], NULL, NULL) < 0 && errno == EAGAIN, "someone else came");
    }
}

/* Datagrams by path, from a socket with a name and from one without. */
static void letters_send(void)
{
    struct sockaddr_un name;
    socklen_t length = unix_name(&name, "letters");
    CHECK(send(fds[1], "signed", 6, 0) == 6, "send");
    CHECK(sendto(fds[2], "unsigned", 8, 0, (struct sockaddr *)&name, length) == 8, "send");
}
static void letters_prepare(void)
{
    struct sockaddr_un name, own;
    socklen_t length = unix_name(&name, "letters"), own_length = unix_name(&own, "@writer");
    for (int i = 0; i < 3; i++)
        fds[i] = socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    CHECK(bind(fds[0], (struct sockaddr *)&name, length) == 0, "bind");
    CHECK(bind(fds[1], (struct sockaddr *)&own, own_length) == 0, "bind");
    CHECK(connect(fds[1], (struct sockaddr *)&name, length) == 0, "connect");
    letters_send();
}
static void letters_fully(void)
{
    struct sockaddr_un from, own;
    socklen_t length = sizeof from, own_length = unix_name(&own, "@writer");
    CHECK(recvfrom(fds[0], text, 100, 0, (struct sockaddr *)&from, &length) == 6, "signed");
    CHECK(length == own_length && memcmp(&from, &own, length) == 0, "sender");
    length = sizeof from;
    CHECK(recvfrom(fds[0], text, 100, 0, (struct sockaddr *)&from, &length) == 8 && length <= 2, "unsigned");
    letters_send();
}

/* A listener to changes of links and IPv4 addresses, which also asks. */
static void netlink_prepare(void)
{
    struct sockaddr_nl name = {.nl_family = AF_NETLINK, .nl_groups = RTMGRP_LINK | RTMGRP_IPV4_IFADDR};
    fds[0] = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    set(fds[0], SOL_NETLINK, NETLINK_EXT_ACK, 1);
    CHECK(bind(fds[0], (struct sockaddr *)&name, sizeof name) == 0, "bind");
}
static void netlink_fully(void)
{
    struct sockaddr_nl name;
    socklen_t length = sizeof name;
    CHECK(getsockname(fds[0], (struct sockaddr *)&name, &length) == 0 && name.nl_pid == (unsigned)getpid(), "port");
    CHECK(name.nl_groups == (RTMGRP_LINK | RTMGRP_IPV4_IFADDR), "groups");
    CHECK(option(fds[0], SOL_NETLINK, NETLINK_EXT_ACK) == 1, "option");
    struct {
        struct nlmsghdr head;
        struct ifinfomsg link;
    } ask = {.head = {.nlmsg_len = sizeof ask, .nlmsg_type = RTM_GETLINK, .nlmsg_flags = NLM_F_REQUEST}};
    ask.link.ifi_index = (int)if_nametoindex("lo");
    CHECK(send(fds[0], &ask, sizeof ask, 0) == (ssize_t)sizeof ask, "send");
    /* Changes of the host may come before the answer. */
    do
        CHECK(recv(fds[0], text, sizeof text, 0) > 0, "answer");
    while (((struct nlmsghdr *)text)->nlmsg_type != RTM_NEWLINK);
}

/* A connection to its own server, whose name is gone: a question on its way, credentials asked for. */
static void own_ask(void)
{
    CHECK(send(fds[0], "question", 8, 0) == 8 && send(fds[1], "answer", 6, 0) == 6, "send");
}
static void own_prepare(void)
{
    struct sockaddr_un name;
    socklen_t length = unix_name(&name, "own");
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(bind(listener, (struct sockaddr *)&name, length) == 0 && listen(listener, 3) == 0, "listen");
    fds[0] = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(connect(fds[0], (struct sockaddr *)&name, length) == 0, "connect");
    CHECK((fds[1] = accept(listener, NULL, NULL)) >= 0, "accept");
    set(fds[1], SOL_SOCKET, SO_PASSCRED, 1);
    close(listener);
    unlink(name.sun_path);
    own_ask();
}
static void own_fully(void)
{
    struct sockaddr_un name, seen;
    socklen_t length = unix_name(&name, "own"), room = sizeof seen;
    CHECK(getpeername(fds[0], (struct sockaddr *)&seen, &room) == 0, "getpeername");
    CHECK(room == length && memcmp(&seen, &name, length) == 0, "name");
    char control[64];
    struct iovec part = {text, sizeof text};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    CHECK(recvmsg(fds[1], &message, 0) == 8 && memcmp(text, "question", 8) == 0, "question");
    struct cmsghdr *by = CMSG_FIRSTHDR(&message);
    struct ucred who;
    CHECK(by && by->cmsg_type == SCM_CREDENTIALS, "credentials");
    memcpy(&who, CMSG_DATA(by), sizeof who);
    CHECK(who.pid == getpid() && who.uid == getuid(), "%d", who.pid);
    CHECK(recv(fds[0], text, sizeof text, MSG_DONTWAIT) == 6, "answer");
    own_ask();
}

ZOO({"udp", udp_prepare, NULL, udp_fully},
    {"udp6", six_prepare, NULL, six_fully},
    {"multicast", group_prepare, NULL, group_fully},
    {"filter", filter_prepare, NULL, filter_fully},
    {"unix_named", named_prepare, NULL, named_fully},
    {"unix_letters", letters_prepare, NULL, letters_fully},
    {"unix_own_server", own_prepare, NULL, own_fully},
    {"netlink", netlink_prepare, NULL, netlink_fully})
