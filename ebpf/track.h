/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What a packet tells of its queue pair, by its opcode. The next request of RC or UC and the next response of a READ are
 * what most packets are, and are dealt with at once; the rest goes the long way. */
#ifndef QPD_TRACK_H
#define QPD_TRACK_H

#include "cm.h"
#include "response.h"

/* SEND and WRITE; SEND with invalidate (22, 23); FLUSH and ATOMIC WRITE (28, 29): a PSN each, as atomics have, too. */
#define PLAIN_REQUESTS 0x30c00fffU
#define REQUESTS       (PLAIN_REQUESTS | ALWAYS_ANSWERED)
/* FIRST and MIDDLE of SEND and WRITE carry a whole path MTU. */
#define FULL_REQUESTS 0x000000c3U

static __always_inline void count_marks(struct qp *qp, const struct packet *packet, struct counters *own,
                                        enum hook hook)
{
	__u32 path = packet->now;

	qp->becn += packet->marks & MARK_BECN;
	qp->fecn += packet->marks >> 1 & 1;
	if (!(packet->marks & MARK_CE))
		return;
	qp->ecn_marked++;
	asm volatile("" : "+r"(path));
	if (path < PATHS_MAX)
		own->faults[hook][path].ecn_marked++;
}

/* The path MTU from a packet that is full: what its UDP header says, less `headers` beside the BTH, and the ICRC. */
static __always_inline void learn_pmtu(struct __sk_buff *skb, const struct packet *packet, struct qp *qp, __u32 headers)
{
	__be16 length = 0;
	__u32 payload;

	bpf_skb_load_bytes(skb, packet->inner_udp + offsetof(struct udphdr, len), &length, sizeof(length));
	payload = bpf_ntohs(length) - sizeof(struct udphdr) - sizeof(struct bth) - headers - sizeof(__be32);
	if (payload >= 256 && payload <= 4096 && !(payload & (payload - 1)))
		qp->pmtu = log2_of(payload);
}

/* How many PSNs a READ request takes: one for each path MTU of its length (9.7.3.1), which no packet of this direction
 * may tell; then those of the other do. */
static __always_inline void reckon_read(struct __sk_buff *skb, const struct packet *packet, struct qp *qp,
                                        enum hook hook, struct request *request, __u32 *octets)
{
	__u32 reth = packet->inner_udp + sizeof(struct udphdr) + sizeof(struct bth);
	struct qp *peer;

	*octets = load_be32(skb, reth + 12);
	if (!qp->pmtu) {
		peer = peer_of(qp, packet, hook);
		if (peer)
			qp->pmtu = peer->pmtu;
	}
	if (!*octets || *octets > 1U << 31)
		*octets = 1;
	if (qp->pmtu)
		request->span = ((*octets - 1) >> (qp->pmtu & 15)) + 1;
	else
		request->unsure = *octets > READ_LEAST;
}

static __always_inline void track_request(struct __sk_buff *skb, struct packet *packet, struct qp *qp,
                                          struct counters *own, enum hook hook)
{
	__u32 transport = packet->opcode >> TRANSPORT_SHIFT, operation = packet->opcode & OPERATIONS, octets = 0;
	struct request request = {.psn = packet->psn & PSN_MASK, .span = 1, .resends = transport == TRANSPORT_RC};

	qp->transport = transport;
	if (!qp->pmtu && FULL_REQUESTS >> operation & 1)
		learn_pmtu(skb, packet, qp, operation == 6 ? 16 : 0);
	if (operation == READ_REQUEST)
		reckon_read(skb, packet, qp, hook, &request, &octets);
	if (follow_stream(qp, own, hook, packet, &request) && transport == TRANSPORT_RC && hook == HOOK_STEER &&
	    asks(packet))
		stamp(qp, packet);
	if (octets)
		qp->read_octets = octets;
}

static __always_inline void track_response(struct __sk_buff *skb, struct packet *packet, struct qp *qp,
                                           struct counters *own, enum hook hook)
{
	__u32 kind = (packet->opcode & OPERATIONS) - READ_RESPONSE_FIRST;

	qp->transport = TRANSPORT_RC;
	if (!qp->pmtu && kind <= READ_MIDDLE)
		learn_pmtu(skb, packet, qp, kind == READ_FIRST ? 4 : 0);
	follow_response(skb, packet, qp, own, hook, kind);
}

/* Neither a request nor the next response of a READ. */
static __always_inline void track_other(struct __sk_buff *skb, struct packet *packet, struct qp *qp,
                                        struct counters *own, enum hook hook)
{
	__u32 operation = packet->opcode & OPERATIONS;

	if (packet->opcode >> TRANSPORT_SHIFT != TRANSPORT_RC) {
		qp->transport = packet->opcode >> TRANSPORT_SHIFT;
		if (packet->opcode == OPCODE_CNP)
			qp->cnps++;
		else if (packet->opcode == UD_SEND_ONLY && packet->key.dest_qp == QP_GENERAL_SERVICES)
			tell_cm(skb, packet, hook, packet->now);
	} else if (operation >= READ_RESPONSE_FIRST && operation <= ATOMIC_ACKNOWLEDGE) {
		track_response(skb, packet, qp, own, hook);
	}
}

static __always_inline void track(struct __sk_buff *skb, struct packet *packet, struct qp *qp, struct counters *own,
                                  enum hook hook)
{
	__u32 operation = packet->opcode & OPERATIONS, psn = packet->psn & PSN_MASK, next = (psn + 1) & PSN_MASK;

	if (packet->opcode >> TRANSPORT_SHIFT <= TRANSPORT_UC && REQUESTS >> operation & 1) {
		if (qp->next_psn == (psn | PSN_KNOWN) && PLAIN_REQUESTS >> operation & 1) {
			qp->next_psn = next | PSN_KNOWN;
			mark_asked(qp, psn - 1, psn);
			qp->window = qp->window << 1 | 1;
			if (hook == HOOK_STEER && packet->psn & ACKNOWLEDGE_REQUEST)
				stamp(qp, packet);
		} else {
			track_request(skb, packet, qp, own, hook);
		}
	} else if (packet->opcode == READ_RESPONSE_FIRST + READ_MIDDLE &&
	           qp->next_response == (psn | PSN_KNOWN | RESPONSE_MORE)) {
		qp->next_response = next | PSN_KNOWN | RESPONSE_MORE;
		mark_answered(qp, psn);
		qp->acked_psn = psn | PSN_KNOWN;
		qp->acks++;
	} else {
		track_other(skb, packet, qp, own, hook);
	}
	if (packet->marks)
		count_marks(qp, packet, own, hook);
}

#endif /* QPD_TRACK_H */
