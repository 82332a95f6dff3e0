/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What comes in on an uplink: counted per path and QP. */
#ifndef QPD_ARRIVE_H
#define QPD_ARRIVE_H

#include "count.h"
#include "flow.h"
#include "track.h"

/* The path by which a frame came: whose neighbour sent it on this uplink? */
static __always_inline __u32 arriving_path(struct __sk_buff *skb)
{
	struct neighbour_key neighbour = {.ifindex = skb->ifindex};
	__u32 *path;

	bpf_skb_load_bytes(skb, offsetof(struct ethhdr, h_source), neighbour.mac, sizeof(neighbour.mac));
	path = neighbours.lookup(&neighbour);
	return path ? *path : NO_PATH;
}

/* The ingress hook's work on a RoCEv2 packet. */
static __always_inline void observe_packet(struct __sk_buff *skb, struct packet *packet, struct counters *own)
{
	__u32 path = arriving_path(skb);
	struct qp *qp = arrivals.lookup(&packet->key);
	enum verdict verdict = VERDICT_OBSERVED;

	if (!qp) {
		struct qp *first = blank_entry(own);

		first->group = NO_GROUP;
		first->home = NO_PATH;
		first->path = path;
		first->first_seen_ns = bpf_ktime_get_ns();
		load_source(skb, packet, &first->src);
		copy_address(&first->destination, &packet->destination);
		arrivals.insert(&packet->key, first);
		qp = arrivals.lookup(&packet->key);
	}
	if (qp) {
		__sync_fetch_and_add(&qp->packets, 1);
		__sync_fetch_and_add(&qp->bytes, packet->bytes);
		qp->last_seen_ns = coarse_now(own);
		packet->before = qp->path;
		packet->now = path;
		if (qp->path != path) {
			qp->path = path;
			qp->moves++;
		}
	} else {
		verdict = VERDICT_MAP_FULL;
	}
	count(own, HOOK_OBSERVE, verdict, path, packet->bytes);
	if (qp)
		track(skb, packet, qp, own, HOOK_OBSERVE);
}

#endif /* QPD_ARRIVE_H */
