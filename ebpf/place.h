/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Which path for which QP: hash, slot, preference order, bounded load. qpd/core/slots.py computes the same. */
#ifndef QPD_PLACE_H
#define QPD_PLACE_H

#include "maps.h"

#define PLACEMENT_ATTEMPTS 8

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

/* QPs whose home the path is. The daemon's count may run ahead by a moment: never below none. */
static __always_inline __u64 active(__u32 path, __u64 *count_placed)
{
	struct load *in = placed.lookup(&path), *out = gone.lookup(&path);
	__s64 left;

	if (!in || !out)
		return 0;
	*count_placed = in->qps;
	left = in->qps - out->qps;
	return left > 0 ? left : 0;
}

/* Adds one to `placed` if it still is `seen`: two CPUs that saw the same count must not both fill the same place.
 * A lock, since clang 14 under bcc emits no compare-and-exchange; it costs 40 ns, once in a QP's life. */
static __always_inline bool claim(__u32 path, __u64 seen)
{
	__u32 index = LOCK_PLACED;
	struct lock *guard = locks.lookup(&index);
	struct load *in = placed.lookup(&path);
	bool done = false;

	if (!guard || !in)
		return false;
	bpf_spin_lock(&guard->lock);
	if (in->qps == seen) {
		in->qps = seen + 1;
		done = true;
	}
	bpf_spin_unlock(&guard->lock);
	return done;
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

/* The first path of the order that holds less than its share, ceil((active + 1) * weight / total) over the usable paths.
 * `count < ceil(a / b)` is `count * b < a` in whole numbers. A count that another CPU raises meanwhile only makes the
 * total too small and so the bound stricter: what claim() then grants is within the true bound. */
static __always_inline __u32 choose_bounded(const struct slot_order *order, const struct group *group, __u64 usable,
                                            __u64 *seen)
{
	__u64 qps = 1, weights = 0;

#pragma clang loop unroll(disable)
	for (int i = 0; i < PATHS_MAX; i++) {
		__u32 path = order->path[i];

		if (path >= PATHS_MAX)
			break;
		if (!(usable >> path & 1))
			continue;
		qps += active(path, seen);
		weights += group->weight[path];
	}
#pragma clang loop unroll(disable)
	for (int i = 0; i < PATHS_MAX; i++) {
		__u32 path = order->path[i];

		if (path >= PATHS_MAX)
			break;
		if (usable >> path & 1 && active(path, seen) * weights < qps * group->weight[path])
			return path;
	}
	return NO_PATH;
}

/* The home of a new QP, counted in `placed`; NO_PATH: no path of the group serves. */
static __always_inline __u32 place(const struct slot_order *order, const struct group *group, __u64 usable,
                                   __u32 placement)
{
	__u32 home;

	if (placement == PLACEMENT_BALANCED) {
#pragma clang loop unroll(disable)
		for (int i = 0; i < PLACEMENT_ATTEMPTS; i++) {
			__u64 seen = 0;

			home = choose_bounded(order, group, usable, &seen);
			if (home >= PATHS_MAX)
				break;
			if (claim(home, seen))
				return home;
		}
	}
	home = choose(order, usable);
	if (home < PATHS_MAX)
		add_placed(home, 1);
	return home;
}

#endif /* QPD_PLACE_H */
