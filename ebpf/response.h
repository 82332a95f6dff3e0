/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Follows the responses to a queue pair's own requests: what they acknowledge, and the PSNs of READ responses, which are
 * those of the request (InfiniBand Architecture 1, 9.7.5). ACKs may be left out or lost without a trace. */
#ifndef QPD_RESPONSE_H
#define QPD_RESPONSE_H

#include "rtt.h"

/* Beside PSN_KNOWN in `next_response`. */
#define RESPONSE_MORE  0x02000000 /* in the midst of a READ's responses */
#define RESPONSE_AGAIN 0x04000000 /* which have come before */
#define RESPONSE_ACKED 0x08000000 /* the last one was an ACK: how many PSNs it left out is not known */

/* How far one answer may be beyond the one before: a message of 1 GB in packets of 4096 octets may be answered once. */
#define ANSWERS_AHEAD_MAX 0x40000

enum response_kind { READ_FIRST, READ_MIDDLE, READ_LAST, READ_ONLY, ACK, ATOMIC_ACK };

/* AETH (9.5.1): bits 6 and 5 tell the kind, the rest a credit, a timer or a code. */
#define AETH_KIND    0x60
#define AETH_ACK     0x00
#define AETH_RNR_NAK 0x20
#define AETH_NAK     0x60
#define AETH_CODE    0x1f
#define NAK_SEQUENCE 0

/* A jump that neither loss nor coalescing explains: what is answered are the requests of another QP of this number. */
static __always_inline bool answers_anew(const struct qp *qp, __u32 psn)
{
	__u32 beyond = psn_distance(qp->acked_psn, psn);

	return qp->acked_psn & PSN_KNOWN && beyond > ANSWERS_AHEAD_MAX && PSN_HALF * 2 - beyond > PSN_BEHIND_MAX;
}

/* Moves `acked_psn` on, if `psn` is newer. */
static __always_inline void acknowledge(struct qp *qp, __u32 psn)
{
	__u32 beyond = psn_distance(qp->acked_psn, psn);

	if (qp->acked_psn & PSN_KNOWN && (!beyond || beyond >= PSN_HALF))
		return;
	mark_answered(qp, psn);
	qp->acked_psn = psn | PSN_KNOWN;
	qp->acks++;
}

static __always_inline bool in_response_gap(const struct qp *qp, __u32 psn)
{
	return psn_distance(qp->response_gap, psn) < qp->response_gaps;
}

/* A READ response that comes again, or late. */
static __always_inline void repeat_read(struct qp *qp, enum response_kind kind, __u32 psn, struct findings *found)
{
	bool begins = kind == READ_FIRST || kind == READ_ONLY, more = kind == READ_FIRST || kind == READ_MIDDLE;
	__u32 state = qp->next_response, follows = psn_distance(state, psn);

	if (begins) {
		/* Requested once more, from the first one that did not arrive. */
		found->retransmitted = 1;
		found->back = true;
		found->from = psn;
		found->hole = in_response_gap(qp, psn);
		qp->response_gaps = 0;
	} else if (state & RESPONSE_AGAIN && follows < PSN_HALF) {
		found->retransmitted = 1;
		found->missing = follows;
	} else if (in_response_gap(qp, psn)) {
		found->out_of_order = 1;
		if (psn == qp->response_gap)
			qp->response_gap = (psn + 1) & PSN_MASK;
		qp->response_gaps--;
		return;
	} else {
		found->duplicates = 1;
		return;
	}
	qp->next_response =
	        ((psn + 1) & PSN_MASK) | PSN_KNOWN | (more ? RESPONSE_MORE : 0) | (more ? RESPONSE_AGAIN : 0);
}

static __always_inline void follow_read(struct qp *qp, enum response_kind kind, __u32 psn, struct findings *found)
{
	bool begins = kind == READ_FIRST || kind == READ_ONLY, more = kind == READ_FIRST || kind == READ_MIDDLE;
	__u32 state = qp->next_response, follows = psn_distance(state, psn);
	__u32 newest = qp->acked_psn;

	if (state & PSN_KNOWN && newest & PSN_KNOWN && psn_distance(newest + 1, psn) >= PSN_HALF) {
		repeat_read(qp, kind, psn, found);
		return;
	}
	if (state & PSN_KNOWN && follows < PSN_AHEAD_MAX) {
		if (state & RESPONSE_MORE)
			found->missing = begins && !follows ? 1 : follows;
		else if (!begins)
			found->missing = state & RESPONSE_ACKED ? 1 : follows;
		if (found->missing) {
			qp->response_gap = (psn - found->missing) & PSN_MASK;
			qp->response_gaps = found->missing < 0xffff ? found->missing : 0xffff;
		}
	}
	qp->next_response = ((psn + 1) & PSN_MASK) | PSN_KNOWN | (more ? RESPONSE_MORE : 0);
}

/* An ACK, or the response to an atomic request, which a responder keeps and sends again when asked. */
static __always_inline void follow_ack(struct qp *qp, enum response_kind kind, __u32 psn, struct findings *found)
{
	__u32 state = qp->next_response, newest = qp->acked_psn;

	if (newest & PSN_KNOWN && psn_distance(newest + 1, psn) >= PSN_HALF) {
		if (kind == ATOMIC_ACK)
			found->retransmitted = 1;
		return;
	}
	/* The end of a READ's responses is missing: one at least. */
	if (state & RESPONSE_MORE && psn_distance(state, psn) < PSN_AHEAD_MAX) {
		found->missing = 1;
		qp->response_gap = state & PSN_MASK;
		qp->response_gaps = 1;
	}
	qp->next_response = ((psn + 1) & PSN_MASK) | PSN_KNOWN | RESPONSE_ACKED;
}

static __always_inline void count_nak(struct qp *qp, __u8 syndrome)
{
	if ((syndrome & AETH_KIND) == AETH_RNR_NAK)
		qp->naks_rnr++;
	else if ((syndrome & AETH_CODE) == NAK_SEQUENCE)
		qp->naks_sequence++;
	else
		qp->naks_remote++;
}

/* A response that is not simply the next one of a READ. */
static __always_inline void follow_response(struct __sk_buff *skb, struct packet *packet, struct qp *qp,
                                            struct counters *own, enum hook hook, enum response_kind kind)
{
	__u32 psn = packet->psn & PSN_MASK;
	struct findings *found = blank_findings(packet);
	__u8 syndrome = AETH_ACK;
	bool positive = true;
	struct qp *peer;

	if (kind == ACK) {
		bpf_skb_load_bytes(skb, packet->inner_udp + sizeof(struct udphdr) + sizeof(struct bth), &syndrome, 1);
		positive = (syndrome & AETH_KIND) == AETH_ACK;
	}
	if (answers_anew(qp, psn))
		begin_life(qp);
	if (!positive) {
		/* Names the request that was refused: those before it are acknowledged. */
		count_nak(qp, syndrome);
		acknowledge(qp, (psn - 1) & PSN_MASK);
	} else {
		if (kind == ACK || kind == ATOMIC_ACK)
			follow_ack(qp, kind, psn, found);
		else
			follow_read(qp, kind, psn, found);
		acknowledge(qp, psn);
		note_findings(qp, own, hook, packet);
	}
	if (kind == READ_MIDDLE || kind == READ_LAST)
		return;
	peer = peer_of(qp, packet, hook);
	if (!peer)
		return;
	if (!positive)
		peer->rnr = (syndrome & AETH_KIND) == AETH_RNR_NAK;
	if (hook == HOOK_OBSERVE)
		answer_stamp(peer, psn, positive);
}

#endif /* QPD_RESPONSE_H */
