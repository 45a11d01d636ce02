/* SPDX-License-Identifier: BSD-3-Clause */
/* The collectives of a synchronised batch norm, written with sends and receives, for SimGrid's SMPI.

   W ranks, P of them a node, both powers of two, a node's ranks next to each other.

   Nothing here is global: all simulated ranks share the variables of one process. */
#ifndef SCALE_COLLECTIVES_H
#define SCALE_COLLECTIVES_H

#include <stddef.h>

/* Ranks base, base + stride, ... of MPI_COMM_WORLD; this rank is the me-th of n. */
struct line {
    int base, stride, n, me;
};

/* A rank's place: everyone, its node, the first ranks of all nodes, and the ranks with its place on their nodes. */
struct place {
    struct line all, node, leaders, peers;
};

/* Whether bytes are really copied and added, to check the algorithms, or only take their time. */
enum payload { ONLY_TIME, REAL };

struct place place_of(int rank, int ranks, int per_node);
struct place place_in_group(int rank, int group, int per_node);

/* buffer and scratch: `bytes` each, of doubles. Afterwards buffer holds the sum on every rank. */
typedef void all_reduce(const struct place *, char *buffer, char *scratch, size_t bytes, enum payload);
all_reduce all_reduce_doubling, all_reduce_nodes;

/* buffer: W blocks of `block` bytes, this rank's own in place. Afterwards all of them, on every rank.
   rounds: what a ring stops after, 0 for all W - 1; the other algorithms do not look at it. */
typedef void all_gather(const struct place *, char *buffer, size_t block, int rounds);
all_gather all_gather_ring, all_gather_doubling, all_gather_leaders, all_gather_slices;

#endif
