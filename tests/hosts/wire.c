// SPDX-License-Identifier: BSD-3-Clause
// A switch with long cables: one TAP device for each host; every frame is lost, queued at the link's rate, delayed.
//     wire CONTROL_FIFO HOST...
// Control, a line each: shape DELAY_US LOSS_PERCENT MBIT, drop HOST 0|1, count (frames and bytes, to stdout).
// For kernels without sch_netem. One process, one thread; frames of one host keep their order.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { MAX = 16, SLOTS = 1 << 13, FRAME = 2048, LIMIT = 4096 };
typedef struct {
    int64_t due;
    int length;
    unsigned char bytes[FRAME];
} Frame;
typedef struct {
    const char *name;
    int fd, dropped;
    int64_t busy;
    unsigned head, tail;
    Frame *queue;
    uint64_t frames, bytes;
} Port;

static Port ports[MAX];
static int count;
static int64_t delay_ns;
static double loss, ns_per_byte;
static struct {
    unsigned char mac[6];
    int port;
} learned[64];
static int n_learned;

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int open_tap(const char *name) {
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI};
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
    snprintf(request.ifr_name, IFNAMSIZ, "%s", name);
    if (fd < 0 || ioctl(fd, TUNSETIFF, &request) < 0) {
        perror(name);
        exit(1);
    }
    return fd;
}

static int port_of(const unsigned char *mac) {
    for (int i = 0; i < n_learned; i++)
        if (!memcmp(learned[i].mac, mac, 6)) return learned[i].port;
    return -1;
}

static void learn(const unsigned char *mac, int port) {
    for (int i = 0; i < n_learned; i++)
        if (!memcmp(learned[i].mac, mac, 6)) {
            learned[i].port = port;
            return;
        }
    if (n_learned < 64) {
        memcpy(learned[n_learned].mac, mac, 6);
        learned[n_learned++].port = port;
    }
}

static void deliver(int from, const Frame *frame) {
    int to = frame->bytes[0] & 1 ? -1 : port_of(frame->bytes);
    for (int i = 0; i < count; i++) {
        if (i == from || (to >= 0 && to != i) || ports[i].dropped) continue;
        if (write(ports[i].fd, frame->bytes, frame->length) < 0) continue; // its queue is full: the frame is lost
    }
}

static void take_in(int from) {
    Port *port = &ports[from];
    for (int k = 0; k < 64; k++) {
        Frame *frame = &port->queue[port->tail % SLOTS];
        frame->length = read(port->fd, frame->bytes, FRAME);
        if (frame->length <= 0) return;
        learn(frame->bytes + 6, from);
        if (port->dropped || drand48() < loss || port->tail - port->head >= LIMIT) continue;
        int64_t t = now();
        port->busy = (port->busy > t ? port->busy : t) + (int64_t)(frame->length * ns_per_byte);
        frame->due = port->busy + delay_ns;
        port->frames++, port->bytes += frame->length;
        port->tail++;
    }
}

static void obey(char *line) {
    char name[64];
    double delay_us, percent, mbit;
    int on;
    if (sscanf(line, "shape %lf %lf %lf", &delay_us, &percent, &mbit) == 3) {
        delay_ns = delay_us * 1000;
        loss = percent / 100;
        ns_per_byte = mbit > 0 ? 8000 / mbit : 0;
    } else if (sscanf(line, "drop %63s %d", name, &on) == 2) {
        for (int i = 0; i < count; i++)
            if (!strcmp(ports[i].name, name)) ports[i].dropped = on;
    } else if (!strncmp(line, "count", 5)) {
        for (int i = 0; i < count; i++) printf("%s %lu %lu\n", ports[i].name, ports[i].frames, ports[i].bytes);
    } else
        fprintf(stderr, "not understood: %s\n", line);
    fflush(stdout);
}

int main(int argc, char **argv) {
    struct pollfd fds[MAX + 1];
    count = argc - 2;
    if (count < 1 || count > MAX) return 2;
    prctl(PR_SET_TIMERSLACK, 1);
    for (int i = 0; i < count; i++) {
        ports[i] = (Port){.name = argv[i + 2], .fd = open_tap(argv[i + 2]), .queue = malloc(SLOTS * sizeof(Frame))};
        fds[i] = (struct pollfd){ports[i].fd, POLLIN, 0};
    }
    mkfifo(argv[1], 0600);
    fds[count] = (struct pollfd){open(argv[1], O_RDWR | O_NONBLOCK), POLLIN, 0};
    for (;;) {
        int64_t t = now(), next = -1;
        for (int i = 0; i < count; i++) {
            Port *port = &ports[i];
            for (; port->head != port->tail; port->head++) {
                const Frame *frame = &port->queue[port->head % SLOTS];
                if (frame->due > t) {
                    if (next < 0 || frame->due < next) next = frame->due;
                    break;
                }
                deliver(i, frame);
            }
        }
        int64_t wait = next < 0 ? 1000000000LL : next - now();
        if (wait < 0) wait = 0;
        struct timespec limit = {wait / 1000000000LL, wait % 1000000000LL};
        if (ppoll(fds, count + 1, &limit, NULL) < 0 && errno != EINTR) {
            perror("ppoll");
            return 1;
        }
        for (int i = 0; i < count; i++)
            if (fds[i].revents) take_in(i);
        if (fds[count].revents & POLLIN) {
            char text[4096], *save;
            int got = read(fds[count].fd, text, sizeof text - 1);
            text[got > 0 ? got : 0] = 0;
            for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) obey(line);
        }
    }
}
