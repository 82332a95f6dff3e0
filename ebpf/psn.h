/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Follows the packet sequence numbers of the requests to a queue pair: what is missing, late, twice or sent again. */
#ifndef QPD_PSN_H
#define QPD_PSN_H

#include "count.h"
#include "marks.h"

#define PSN_HALF 0x800000 /* InfiniBand Architecture 1, 9.7.2: half of all numbers lie ahead, half behind */

/* More than can be on its way at 200 Gbit/s over 50 ms. A jump beyond is a QP that began anew: counting it would drown
 * all real loss. A first PSN drawn at random falls within by one chance in forty, for which there is no remedy here. */
#define PSN_AHEAD_MAX  0x20000
#define PSN_BEHIND_MAX 0x40000

#define WINDOW         64 /* PSNs that struct qp's `window` remembers */

/* Beside PSN_KNOWN in `next_psn`. With any of them set it equals no PSN, which is how the common way leaves the rest aside. */
#define STREAM_WAITING 0x02000000 /* packets from behind wait for their successor to tell what they are: */
#define STREAM_FILLS   0x04000000 /* … each was missing: late, or the first of those that are sent again */
#define STREAM_RUN     0x08000000 /* the sender has gone back, and has not caught up yet */
/* … and STREAM_READ (maps.h) */
#define STREAM_FLAGS (STREAM_WAITING | STREAM_FILLS | STREAM_RUN | STREAM_READ)

#define READ_LEAST   256 /* the smallest path MTU: takes the most PSNs */

/* A request as the stream sees it. */
struct request {
	__u32 psn;
	__u32 span;   /* PSNs that it takes: of a READ as many as its responses */
	bool unsure;  /* `span` is the least that it may be */
	bool resends; /* RC: what is lost is sent again. UC: it is not */
};

static __always_inline __u32 psn_distance(__u32 from, __u32 to)
{
	return (to - from) & PSN_MASK;
}

/* --- Counting --- */

/* Adds up what has been found, per QP and per path. Loss before this hook belongs to the path of the packets before: where
 * a QP has just moved, what is missing was still sent the old way. */
static __always_inline void note_findings(struct qp *qp, struct counters *own, enum hook hook,
                                          const struct packet *packet)
{
	const struct findings *found = &packet->found;
	__u32 before = packet->before, now = packet->now;
	bool behind = false;

	if (found->back) {
		bool explained = found->hole || qp->gap_psn == (found->from | PSN_KNOWN) || qp->rnr;

		behind = !explained;
		qp->go_backs++;
		qp->lost_behind += behind;
		qp->gap_psn = 0;
		qp->rnr = 0;
	}
	if (!qp->gap_psn)
		qp->gap_psn = found->gap;
	qp->missing += found->missing;
	qp->out_of_order += found->out_of_order;
	qp->duplicates += found->duplicates;
	qp->retransmitted += found->retransmitted;
	if (found->missing)
		qp->gap_path = before;
	asm volatile("" : "+r"(before));
	if (before < PATHS_MAX) {
		own->faults[hook][before].missing += found->missing;
		own->faults[hook][before].lost_behind += behind;
	}
	asm volatile("" : "+r"(now));
	if (now < PATHS_MAX)
		own->faults[hook][now].retransmitted += found->retransmitted;
	now = qp->gap_path;
	asm volatile("" : "+r"(now));
	if (now < PATHS_MAX)
		own->faults[hook][now].out_of_order += found->out_of_order;
}

/* --- The stream --- */

/* Another QP of the same number: what was known of the one before, and with whom it spoke, is over. */
static __always_inline void begin_life(struct qp *qp)
{
	qp->restarts++;
	qp->peer_qp = 0;
	qp->next_psn = 0;
	qp->next_response = 0;
	qp->acked_psn = 0;
	qp->response_gaps = 0;
	qp->gap_psn = 0;
	qp->rnr = 0;
	qp->stamp_ns = 0;
	forget_marks(qp);
}

static __always_inline void begin_stream(struct qp *qp, const struct request *request)
{
	qp->next_psn = ((request->psn + request->span) & PSN_MASK) | PSN_KNOWN | (request->unsure ? STREAM_READ : 0);
	qp->first_psn = request->psn | PSN_KNOWN;
	qp->window = ~0ULL; /* what came before was not missed */
	qp->run = 0;
	qp->gap_psn = 0;
	qp->stamp_ns = 0;
}

/* PSNs that a READ before may have taken beyond those reckoned with. */
static __always_inline __u32 slack(const struct qp *qp)
{
	return qp->next_psn & STREAM_READ ? (qp->read_octets - 1) / READ_LEAST : 0;
}

static __always_inline __u32 less(__u32 count, __u32 allowed)
{
	return count > allowed ? count - allowed : 0;
}

/* The newest packet yet, `ahead` PSNs beyond the one that was due. */
static __always_inline void advance(struct qp *qp, const struct request *request, __u32 ahead, struct findings *found)
{
	__u32 due = qp->next_psn & PSN_MASK, taken = slack(qp), gap = less(ahead, taken);
	__u32 shift = ahead + request->span;
	__u64 own = request->span < WINDOW ? (1ULL << request->span) - 1 : ~0ULL;
	__u64 window = qp->window;

	/* Fills with no successor of theirs were late; a repeat alone amid new packets was none of the sender's. */
	if (qp->next_psn & STREAM_FILLS)
		found->out_of_order = qp->run;
	else if (qp->next_psn & STREAM_WAITING)
		found->duplicates = 1;
	if (qp->next_psn & STREAM_RUN) {
		/* What the sender has sent again, but for what came, is lost once more. */
		found->missing = less(psn_distance(qp->run_psn, request->psn), taken);
		due = qp->run_psn;
	} else {
		found->missing = gap;
	}
	if (found->missing)
		found->gap = ((due + taken) & PSN_MASK) | PSN_KNOWN;
	if (ahead && !gap) {
		/* The PSNs of a READ: nothing is due there. */
		window = ahead < WINDOW ? window << ahead | ((1ULL << ahead) - 1) : ~0ULL;
		shift = request->span;
	}
	qp->window = shift < WINDOW ? window << shift | own : own;
	if (ahead)
		mark_missed(qp, qp->next_psn - 1, request->psn - 1);
	mark_asked(qp, request->psn - 1, request->psn + request->span - 1);
	qp->next_psn = ((request->psn + request->span) & PSN_MASK) | PSN_KNOWN | (request->unsure ? STREAM_READ : 0);
}

/* A packet of a service that sends again whatever is lost, `behind` PSNs before the one that is due. The sender goes back
 * to what was not acknowledged and sends everything from there (go-back-N), so a packet's successor tells what it is. */
static __always_inline void step_back(struct qp *qp, const struct request *request, __u32 behind,
                                      struct findings *found)
{
	bool seen = behind > WINDOW || qp->window >> ((behind - 1) & (WINDOW - 1)) & 1;
	__u32 state = qp->next_psn & STREAM_FLAGS, next = qp->next_psn & PSN_MASK;
	__u32 follows = psn_distance(qp->run_psn, request->psn), lost = less(follows, slack(qp));
	__u32 after = (request->psn + request->span) & PSN_MASK;

	if (behind <= WINDOW)
		qp->window |= 1ULL << ((behind - 1) & (WINDOW - 1));
	found->from = qp->run_from;
	if (state & STREAM_FILLS && !seen && !follows) {
		qp->run++;
	} else if (state & STREAM_FILLS && !(seen && follows < PSN_HALF)) {
		found->out_of_order = qp->run;
		state = 0;
	} else if (state & STREAM_WAITING && follows < PSN_HALF) {
		/* What waited was the beginning of a run. Behind missing ones comes what had been there: none was late. */
		found->retransmitted = qp->run + 1;
		found->missing = lost;
		found->back = true;
		found->hole = state & STREAM_FILLS;
		state = STREAM_RUN;
	} else if (state & STREAM_WAITING) {
		found->retransmitted = 1;
		found->back = true;
		state = 0;
	} else if (state & STREAM_RUN) {
		found->retransmitted = 1;
		if (follows < PSN_HALF) {
			found->missing = lost;
		} else {
			found->from = request->psn;
			found->back = true;
		}
		state = STREAM_RUN;
	}
	if (found->missing)
		found->gap = qp->run_psn | PSN_KNOWN;
	if (!(state & (STREAM_RUN | STREAM_WAITING))) {
		qp->run = 1;
		qp->run_from = request->psn;
		state = STREAM_WAITING | (seen ? 0 : STREAM_FILLS);
		if (seen && (behind > WINDOW || psn_distance(next, after) < PSN_HALF)) {
			found->from = request->psn;
			found->retransmitted++;
			found->back = true;
			state = STREAM_RUN;
		}
	}
	qp->run_psn = after;
	/* Caught up: what comes next is due. */
	if (state & STREAM_RUN && psn_distance(next, after) < PSN_HALF) {
		mark_missed(qp, next - 1, after - 1);
		next = after;
		state = 0;
	}
	qp->next_psn = next | PSN_KNOWN | state | (request->unsure ? STREAM_READ : 0);
}

/* A request that is not simply the next one. True: it is the newest one yet. */
static __always_inline bool follow_stream(struct qp *qp, struct counters *own, enum hook hook, struct packet *packet,
                                          const struct request *request)
{
	__u32 ahead = psn_distance(qp->next_psn, request->psn), behind = psn_distance(request->psn, qp->next_psn);
	struct findings *found = blank_findings(packet);

	if (!(qp->next_psn & PSN_KNOWN)) {
		begin_stream(qp, request);
		return true;
	}
	if (ahead < PSN_HALF ? less(ahead, slack(qp)) > PSN_AHEAD_MAX : behind > PSN_BEHIND_MAX) {
		begin_life(qp);
		begin_stream(qp, request);
		return true;
	}
	if (ahead < PSN_HALF) {
		advance(qp, request, ahead, found);
	} else {
		qp->stamp_ns = 0; /* Karn: nobody can tell which of the two the response answers */
		if (request->resends) {
			step_back(qp, request, behind, found);
		} else if (behind <= WINDOW && qp->window >> ((behind - 1) & (WINDOW - 1)) & 1) {
			found->duplicates = 1;
		} else {
			found->out_of_order = 1;
			if (behind <= WINDOW)
				qp->window |= 1ULL << ((behind - 1) & (WINDOW - 1));
		}
	}
	note_findings(qp, own, hook, packet);
	return ahead < PSN_HALF;
}

#endif /* QPD_PSN_H */
