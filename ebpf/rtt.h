/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Round-trip times, from this node to a remote host and back: a request is stamped as it leaves, and its response tells.
 *
 * One stamp a QP, on a request that asks for a response. Only the response with this very PSN is taken: one with a later
 * PSN may answer the later request alone, as coalesced ACKs do, and voids the stamp. So does whatever the sender sends
 * again (Karn), a NAK, and a change of path. */
#ifndef QPD_RTT_H
#define QPD_RTT_H

#include "psn.h"

#define STAMP_LIFE_NS 10000000000ULL /* a response that late is an answer to nothing */

/* The entry of a QP's peer: the other direction of the same pair, at the other hook. NULL: not known, or gone. */
static __always_inline struct qp *peer_of(const struct qp *qp, const struct packet *packet, enum hook hook)
{
	struct qp_key key = {.vni = packet->key.vni, .dest_qp = qp->peer_qp};
	struct qp *peer;

	if (!qp->peer_qp)
		return NULL;
	copy_address(&key.dst, &qp->src);
	if (hook == HOOK_STEER)
		peer = arrivals.lookup(&key);
	else
		peer = qps.lookup(&key);
	return peer && peer->peer_qp == packet->key.dest_qp ? peer : NULL;
}

/* A request that leaves for the first time, and asks for a response. */
static __always_inline void stamp(struct qp *qp, const struct packet *packet)
{
	__u64 now;

	if (!qp->peer_qp)
		return;
	now = bpf_ktime_get_ns();
	if (qp->stamp_ns && now - qp->stamp_ns < STAMP_LIFE_NS)
		return;
	qp->stamp_psn = packet->psn & PSN_MASK;
	qp->stamp_ns = now;
}

static __always_inline __u32 log2_of(__u32 number)
{
	__u32 result = 0;

#pragma unroll
	for (int bits = 16; bits; bits >>= 1) {
		if (number >> bits) {
			number >>= bits;
			result += bits;
		}
	}
	return result;
}

static __always_inline __u32 rtt_bucket(__u32 ns)
{
	__u32 doubling = log2_of(ns);

	if (doubling < RTT_FIRST)
		return 0;
	return (doubling - RTT_FIRST) * RTT_STEPS + ((__u64)ns * RTT_STEPS >> doubling & (RTT_STEPS - 1));
}

static __always_inline void note_rtt(struct qp *qp, __u64 elapsed)
{
	__u32 ns = elapsed < 0xffffffff ? elapsed : 0xffffffff, bucket = rtt_bucket(ns), path = qp->path;
	struct path_rtt *rtt = rtts.lookup(&path);

	qp->rtt_last_ns = ns;
	if (!qp->rtt_samples || ns < qp->rtt_min_ns)
		qp->rtt_min_ns = ns;
	qp->rtt_sum_ns += ns;
	qp->rtt_samples++;
	if (!rtt)
		return;
	asm volatile("" : "+r"(bucket));
	if (bucket >= RTT_BUCKETS)
		return;
	__sync_fetch_and_add(&rtt->samples, 1);
	__sync_fetch_and_add(&rtt->sum_ns, ns);
	__sync_fetch_and_add(&rtt->buckets[bucket], 1);
}

/* A response has come in: `qp` is the entry of the requests that it may answer. */
static __always_inline void answer_stamp(struct qp *qp, __u32 psn, bool positive)
{
	__u32 beyond = psn_distance(qp->stamp_psn, psn);

	if (!qp->stamp_ns || beyond >= PSN_HALF)
		return;
	if (!beyond && positive)
		note_rtt(qp, bpf_ktime_get_ns() - qp->stamp_ns);
	qp->stamp_ns = 0;
}

#endif /* QPD_RTT_H */
