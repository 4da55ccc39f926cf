/*
 * The wire of the emulated home (home.py): a switch that holds every Ethernet frame for as long as the link would.
 *
 *     delay_line PID…
 *
 * makes a TAP device "eth0" in the network namespace of each process, prints "ready …" and then moves frames between them until
 * its standard input ends; the devices vanish with it. Device i has the hardware address 02:00:00:00:00:(i + 1).
 *
 * A frame from s to d waits for the uplink of s to be free and takes bytes / up(s) on it; its first byte arrives (latency(s) +
 * latency(d)) / 2 later, give or take the jitter; it then takes bytes / down(d) on the downlink of d, which may begin before the
 * uplink has ended, as in a stream of small frames. Frames of one link stay in order. Frames larger than 1500 bytes (TCP leaves
 * it to the card to cut them) pass whole, and are counted with the headers that they would have had.
 *
 * Commands on standard input, one a line, each answered with one line on standard output:
 *     link I LATENCY_NS JITTER_NS UP DOWN      of device I; UP and DOWN in bytes a second, 0 for no limit
 *     drop I 0|1                               whether frames from and to device I vanish (a cable pulled out)
 *     stat                                     frames, bytes, lost; mean and largest ns that frames left too late; since the last
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MOST_DEVICES = 64, LARGEST = 65536 + 256, BATCH = 64 };
/* Timers ring late by about the same time again and again, so they are set that much early, by at most this (ns). */
static const int64_t MOST_LEAD = 60000;
static const uint64_t MOST_HELD = 1u << 29; /* bytes in frames; what comes beyond is lost, and counted */

struct frame {
    uint64_t not_before; /* ns: the last byte cannot arrive sooner than this, its sender's uplink being slower */
    uint32_t length;     /* bytes of data: virtio header and frame */
    uint32_t wire;       /* bytes that the link carries */
    uint8_t to;
    uint8_t arrived; /* the first byte is at the receiver's downlink */
    char data[];
};

struct entry { /* of the heap of what is on its way */
    uint64_t due, order;
    struct frame *frame;
};

struct device {
    int tap;
    int64_t latency, jitter; /* ns, one way */
    double up, down;         /* seconds a byte */
    uint64_t up_free, down_free;
    int drop;
};

static struct device devices[MOST_DEVICES];
static uint64_t last_arrival[MOST_DEVICES][MOST_DEVICES];
static int n_devices;
static struct entry *heap;
static size_t heap_used, heap_room;
static uint64_t n_pushed, held;
static struct {
    uint64_t frames, bytes, lost, late_sum, late_max;
} seen;

static void die(const char *what) {
    fprintf(stderr, "delay_line: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t later(uint64_t a, uint64_t b) { return a > b ? a : b; }

static int before(const struct entry *a, const struct entry *b) {
    return a->due != b->due ? a->due < b->due : a->order < b->order;
}

static void push(uint64_t due, struct frame *frame) {
    if (heap_used == heap_room) {
        heap_room = heap_room ? 2 * heap_room : 4096;
        heap = realloc(heap, heap_room * sizeof *heap);
        if (!heap) die("memory");
    }
    struct entry entry = {due, n_pushed++, frame};
    size_t i = heap_used++;
    for (; i && before(&entry, &heap[(i - 1) / 2]); i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = entry;
}

static struct entry pop(void) {
    struct entry top = heap[0], last = heap[--heap_used];
    size_t i = 0, child;
    while ((child = 2 * i + 1) < heap_used) {
        if (child + 1 < heap_used && before(&heap[child + 1], &heap[child])) child++;
        if (!before(&heap[child], &last)) break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = last;
    return top;
}

static int64_t jittered(int64_t most) { /* uniform in -most … most */
    static uint64_t state = 88172645463325252u;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17; /* Marsaglia's xorshift */
    return most ? (int64_t)(state % (2 * (uint64_t)most + 1)) - most : 0;
}

/* Write out what is due. */
static void deliver(void) {
    uint64_t now = now_ns();
    while (heap_used && heap[0].due <= now) {
        struct entry entry = pop();
        struct frame *frame = entry.frame;
        struct device *to = &devices[frame->to];
        if (!frame->arrived) {
            uint64_t start = later(entry.due, to->down_free);
            uint64_t end = later(start + (uint64_t)(to->down * 1e9 * frame->wire), frame->not_before);
            to->down_free = end;
            frame->arrived = 1;
            if (end > now) {
                push(end, frame);
                continue;
            }
            entry.due = end;
        }
        if (to->drop || to->tap < 0 || write(to->tap, frame->data, frame->length) < 0) {
            seen.lost++;
        } else {
            uint64_t late = now - entry.due;
            seen.late_sum += late;
            seen.late_max = later(seen.late_max, late);
            seen.frames++, seen.bytes += frame->wire;
        }
        held -= frame->length;
        free(frame);
        now = now_ns();
    }
}

/* Bytes that the link carries for this frame: one that the card would have cut counts with each part's headers. */
static uint32_t wire_bytes(const char *data, uint32_t length) {
    struct virtio_net_hdr header;
    memcpy(&header, data, sizeof header);
    uint32_t bytes = length - (uint32_t)sizeof header;
    if (header.gso_type == VIRTIO_NET_HDR_GSO_NONE || !header.gso_size || bytes <= header.hdr_len) return bytes;
    return bytes + (bytes - header.hdr_len - 1) / header.gso_size * header.hdr_len;
}

static void send_on(int s, int d, uint64_t up_start, uint64_t up_end, const char *data, uint32_t length, uint32_t wire) {
    struct frame *frame = held + length > MOST_HELD ? NULL : malloc(sizeof *frame + length);
    if (!frame || devices[s].drop || devices[d].drop) {
        seen.lost++;
        free(frame);
        return;
    }
    int64_t latency = (devices[s].latency + devices[d].latency) / 2;
    int64_t delay = latency + jittered((devices[s].jitter + devices[d].jitter) / 2);
    uint64_t arrival = later(up_start + (uint64_t)(delay > 0 ? delay : 0), last_arrival[s][d]);
    last_arrival[s][d] = arrival;
    *frame = (struct frame){.not_before = arrival + (up_end - up_start), .length = length, .wire = wire, .to = (uint8_t)d};
    memcpy(frame->data, data, length);
    held += length;
    push(arrival, frame);
}

/* Take what device s sends. */
static void receive(int s) {
    static char data[LARGEST];
    struct device *from = &devices[s];
    for (int i = 0; i < BATCH; i++) {
        ssize_t got = read(from->tap, data, sizeof data);
        if (got < 0) {
            if (errno != EAGAIN && errno != EINTR && errno != EIO) from->tap = -1; /* its namespace is gone */
            return;
        }
        const uint8_t *to = (const uint8_t *)data + sizeof(struct virtio_net_hdr);
        if ((size_t)got < sizeof(struct virtio_net_hdr) + 14) continue;
        uint32_t length = (uint32_t)got, wire = wire_bytes(data, length);
        uint64_t up_start = later(now_ns(), from->up_free);
        uint64_t up_end = from->up_free = up_start + (uint64_t)(from->up * 1e9 * wire);
        int one = to[5] - 1;
        if (to[0] & 1) { /* for all */
            for (int d = 0; d < n_devices; d++)
                if (d != s) send_on(s, d, up_start, up_end, data, length, wire);
        } else if (one >= 0 && one < n_devices && one != s) {
            send_on(s, one, up_start, up_end, data, length, wire);
        } else {
            seen.lost++;
        }
        deliver();
    }
}

static void obey(char *line) {
    long long latency, jitter, up, down;
    int i, on;
    if (sscanf(line, "link %d %lld %lld %lld %lld", &i, &latency, &jitter, &up, &down) == 5 && i >= 0 && i < n_devices) {
        struct device *device = &devices[i];
        device->latency = latency, device->jitter = jitter;
        device->up = up > 0 ? 1.0 / (double)up : 0.0;
        device->down = down > 0 ? 1.0 / (double)down : 0.0;
        puts("ok");
    } else if (sscanf(line, "drop %d %d", &i, &on) == 2 && i >= 0 && i < n_devices) {
        devices[i].drop = on;
        puts("ok");
    } else if (!strcmp(line, "stat")) {
        printf("ok %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", seen.frames, seen.bytes, seen.lost,
               seen.frames ? seen.late_sum / seen.frames : 0, seen.late_max);
        memset(&seen, 0, sizeof seen);
    } else {
        printf("no command: %s\n", line);
    }
    fflush(stdout);
}

/* Read commands; 0 at the end of them. */
static int listen_to_orders(void) {
    static char text[4096];
    static size_t used;
    ssize_t got = read(STDIN_FILENO, text + used, sizeof text - 1 - used);
    if (got < 0) return errno == EAGAIN || errno == EINTR;
    if (got == 0) return 0;
    used += (size_t)got;
    text[used] = 0;
    char *start = text, *end;
    while ((end = strchr(start, '\n'))) {
        *end = 0;
        obey(start);
        start = end + 1;
    }
    used = (size_t)(text + used - start);
    if (used == sizeof text - 1) return 0;
    memmove(text, start, used);
    return 1;
}

static void enter(const char *pid) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%s/ns/net", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || setns(fd, CLONE_NEWNET) < 0) die(path);
    close(fd);
}

static int make_tap(int i) {
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) die("/dev/net/tun");
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
    strcpy(request.ifr_name, "eth0");
    if (ioctl(fd, TUNSETIFF, &request) < 0) die("a TAP device eth0");
    /* TCP may leave checksums, and the cutting into frames, to this card: several hundred MB/s are not to be had else. */
    if (ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4) < 0) die("TUNSETOFFLOAD");
    int sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    request = (struct ifreq){.ifr_hwaddr = {.sa_family = 1 /* ARPHRD_ETHER */}};
    strcpy(request.ifr_name, "eth0");
    request.ifr_hwaddr.sa_data[0] = 2;
    request.ifr_hwaddr.sa_data[5] = (char)(i + 1);
    if (sock < 0 || ioctl(sock, SIOCSIFHWADDR, &request) < 0) die("SIOCSIFHWADDR");
    close(sock);
    return fd;
}

int main(int argc, char **argv) {
    if (argc < 2 || argc - 1 > MOST_DEVICES) {
        fprintf(stderr, "usage: delay_line PID… (at most %d)\n", MOST_DEVICES);
        return 2;
    }
    n_devices = argc - 1;
    int home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    for (int i = 0; i < n_devices; i++) {
        enter(argv[i + 1]);
        devices[i].tap = make_tap(i);
    }
    if (setns(home, CLONE_NEWNET) < 0) die("the namespace that it came from");
    /* Before all else that runs, so that busy processors do not delay frames; where that is not allowed, as nearly as may be. */
    struct sched_param first = {.sched_priority = 50};
    int fifo = sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &first) == 0;
    if (!fifo) setpriority(PRIO_PROCESS, 0, -20);
    prctl(PR_SET_TIMERSLACK, 1ul);
    printf("ready %s\n", fifo ? "first" : "nice");
    fflush(stdout);

    struct pollfd polls[MOST_DEVICES + 1];
    int64_t lead = 0;
    for (;;) {
        deliver();
        for (int i = 0; i < n_devices; i++) polls[i] = (struct pollfd){.fd = devices[i].tap, .events = POLLIN};
        polls[n_devices] = (struct pollfd){.fd = STDIN_FILENO, .events = POLLIN};
        uint64_t now = now_ns(), ring = heap_used ? heap[0].due - (uint64_t)lead : 0, wait = ring > now ? ring - now : 0;
        struct timespec timeout = {.tv_sec = (time_t)(wait / 1000000000u), .tv_nsec = (long)(wait % 1000000000u)};
        int ready = ppoll(polls, (nfds_t)n_devices + 1, heap_used ? &timeout : NULL, NULL);
        if (ready <= 0) {
            if (ready == 0 && wait) {
                lead += ((int64_t)(now_ns() - ring) - lead) / 16;
                lead = lead > MOST_LEAD ? MOST_LEAD : lead;
            }
            continue;
        }
        for (int i = 0; i < n_devices; i++) {
            if (polls[i].revents & POLLIN) receive(i);
            else if (polls[i].revents) devices[i].tap = -1;
        }
        if (polls[n_devices].revents && !listen_to_orders()) return 0;
    }
}
