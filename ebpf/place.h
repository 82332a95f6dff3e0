/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Which path for which QP: hash, slot, preference order, bounded load. qpd/core/slots.py computes the same. */
#ifndef QPD_PLACE_H
#define QPD_PLACE_H

#include "maps.h"

#define PLACEMENT_ATTEMPTS 2

/* docs/architecture.md, "Hash of a QP". */
static __always_inline __u32 mix(__u32 hash, __u32 word)
{
	hash = (hash ^ word) * 0x9e3779b1;
	return hash ^ hash >> 15;
}

static __always_inline __u32 hash_qp(const struct qp_key *key)
{
	const __be32 *dst = (const __be32 *)&key->dst;
	__u32 hash = 0x71706431;

	hash = mix(hash, key->vni);
	hash = mix(hash, key->dest_qp);
	hash = mix(hash, bpf_ntohl(dst[0]));
	hash = mix(hash, bpf_ntohl(dst[1]));
	hash = mix(hash, bpf_ntohl(dst[2]));
	hash = mix(hash, bpf_ntohl(dst[3]));
	hash ^= hash >> 16;
	hash *= 0x85ebca6b;
	hash ^= hash >> 13;
	hash *= 0xc2b2ae35;
	return hash ^ hash >> 16;
}

static __always_inline __u16 slot_of(__u32 hash)
{
	return hash & (SLOTS - 1);
}

/* In the dynamic range, as RFC 7348, 5 recommends; made of bits that the slot does not use. */
static __always_inline __u16 source_port_of(__u32 hash)
{
	return 49152 + (hash >> 18);
}

static __always_inline struct slot_order *order_of(const struct group *group, __u32 slot)
{
	__u32 index = (group->table & (TABLES_MAX - 1)) * SLOTS + (slot & (SLOTS - 1));

	return slots.lookup(&index);
}

/* The paths that serve now, of all groups. */
static __always_inline __u64 living_paths(void)
{
	__u32 daemon = LIVING_DAEMON, tap = LIVING_TAP;
	__u64 *wanted = living.lookup(&daemon), *dead = living.lookup(&tap);

	return wanted && dead ? *wanted & ~*dead : 0;
}

/* The first path of the order whose bit is set in `usable`; NO_PATH: there is none. */
static __always_inline __u32 choose(const struct slot_order *order, __u64 usable)
{
#pragma clang loop unroll(disable)
	for (int i = 0; i < PATHS_MAX; i++) {
		__u32 path = order->path[i];

		if (path >= PATHS_MAX)
			break;
		if (usable >> path & 1)
			return path;
	}
	return NO_PATH;
}

/* A path id as an index. The compiler keeps a copy from before its check, for which a verifier as of Linux 6.1 knows no
 * limit: so it is masked where the compiler cannot see that this changes nothing. */
static __always_inline __u64 as_index(__u64 path)
{
	asm volatile("" : "+r"(path));
	return path & (PATHS_MAX - 1);
}

/* QPs that send whose home the path is. The daemon's count may run ahead by a moment: never below none. */
static __always_inline __u64 active(const struct load *in, const struct load *out)
{
	__s64 left = in->qps - out->qps;

	return left > 0 ? left : 0;
}

/* Adds a QP to the path unless that holds its share of `qps` already: count < ceil(qps * weight / weights), which in whole
 * numbers is count * weights < qps * weight. Counts and adds under a lock (40 ns, once in a QP's life; clang 14 under bcc
 * emits no compare-and-exchange), so that two CPUs do not both take the last place. */
static __always_inline bool claim(__u32 path, __u64 qps, __u64 weights, __u64 weight)
{
	__u32 index = LOCK_PLACED;
	struct lock *guard = locks.lookup(&index);
	struct load *in = placed.lookup(&path), *out = gone.lookup(&path);
	bool room;

	if (!guard || !in || !out)
		return false;
	bpf_spin_lock(&guard->lock);
	room = active(in, out) * weights < qps * weight;
	if (room)
		in->qps++;
	bpf_spin_unlock(&guard->lock);
	return room;
}

/* Adds to `placed` whatever it is now. Under the same lock, so that no claim is lost. */
static __always_inline void add_placed(__u32 path, __s64 qps)
{
	__u32 index = LOCK_PLACED;
	struct lock *guard = locks.lookup(&index);
	struct load *in = placed.lookup(&path);

	if (!guard || !in)
		return;
	bpf_spin_lock(&guard->lock);
	in->qps += qps;
	bpf_spin_unlock(&guard->lock);
}

/* A QP that has only answered until now sends: it counts from here on, where it is. Under the same lock, which lets one of
 * two CPUs do it; where its home has changed meanwhile, its next packet does. */
static __always_inline void count_placed(struct qp *qp)
{
	__u32 index = LOCK_PLACED, home = qp->home;
	struct lock *guard = locks.lookup(&index);
	struct load *in = placed.lookup(&home);

	if (!guard || !in)
		return;
	bpf_spin_lock(&guard->lock);
	if (!qp->counted && qp->home == home) {
		qp->counted = 1;
		in->qps++;
	}
	bpf_spin_unlock(&guard->lock);
}

/* Gives a QP another home, and takes its count along if it has one. Under the same lock. */
static __always_inline void move_home(struct qp *qp, __u32 to)
{
	__u32 index = LOCK_PLACED, from = qp->home;
	struct lock *guard = locks.lookup(&index);
	struct load *less = placed.lookup(&from), *more = placed.lookup(&to);

	if (!guard || !less || !more)
		return;
	bpf_spin_lock(&guard->lock);
	if (qp->home == from) {
		less->qps -= qp->counted;
		more->qps += qp->counted;
		qp->home = to;
	}
	bpf_spin_unlock(&guard->lock);
}

/* The first path of the order that holds less than its share of all QPs of the usable paths, this one included. Counted
 * there; NO_PATH: none. What other CPUs place meanwhile makes the total too small, and so the share stricter: a place that
 * is granted is within the true share, but for once all may seem full. */
static __always_inline __u32 claim_bounded(const struct slot_order *order, const struct group *group, __u64 usable)
{
	__u64 qps = 1, weights = 0;

#pragma clang loop unroll(disable)
	for (int i = 0; i < PATHS_MAX; i++) {
		__u32 path = order->path[i];
		struct load *in = placed.lookup(&path), *out = gone.lookup(&path);

		if (path >= PATHS_MAX || !in || !out)
			break;
		if (usable >> path & 1) {
			qps += active(in, out);
			weights += group->weight[as_index(path)];
		}
	}
#pragma clang loop unroll(disable)
	for (int i = 0; i < PATHS_MAX; i++) {
		__u32 path = order->path[i];

		if (path >= PATHS_MAX)
			break;
		if (usable >> path & 1 && claim(path, qps, weights, group->weight[as_index(path)]))
			return path;
	}
	return NO_PATH;
}

/* The home of a new QP; NO_PATH: no path of the group serves. Counted in `placed`, unless the QP only answers: then its
 * slot's order alone decides. */
static __always_inline __u32 place(const struct slot_order *order, const struct group *group, __u64 usable,
                                   __u32 placement, bool counted)
{
	__u32 home;

	if (counted && placement == PLACEMENT_BALANCED) {
#pragma clang loop unroll(disable)
		for (int i = 0; i < PLACEMENT_ATTEMPTS; i++) {
			home = claim_bounded(order, group, usable);
			if (home < PATHS_MAX)
				return home;
		}
	}
	home = choose(order, usable);
	if (counted && home < PATHS_MAX)
		add_placed(home, 1);
	return home;
}

#endif /* QPD_PLACE_H */
