/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Messages of the connection manager, which name the queue pairs that are about to speak with each other (InfiniBand
 * Architecture 1, 12.6): handed to the daemon. */
#ifndef QPD_CM_H
#define QPD_CM_H

#include "psn.h"

#define QP_GENERAL_SERVICES 1 /* 3.9.4 */
#define CM_CLASS            0x07
#define MAD_ATTRIBUTE       16 /* offsets in a MAD (13.4.3) */
#define MAD_DATA            24
#define CM_REQ              0x10
#define CM_REJ              0x12
#define CM_REP              0x13
#define CM_DREQ             0x15
#define CM_DREP             0x16

static __always_inline __u32 load_be32(struct __sk_buff *skb, __u32 at)
{
	__be32 word = 0;

	bpf_skb_load_bytes(skb, at, &word, sizeof(word));
	return bpf_ntohl(word);
}

static __always_inline void tell_cm(struct __sk_buff *skb, const struct packet *packet, enum hook hook, __u32 path)
{
	/* UDP, BTH and DETH come before it. */
	__u32 mad = packet->inner_udp + sizeof(struct udphdr) + sizeof(struct bth) + 8, data = mad + MAD_DATA;
	__u32 attribute = load_be32(skb, mad + MAD_ATTRIBUTE) >> 16;
	struct event_cm event = {};

	if ((load_be32(skb, mad) >> 16 & 0xff) != CM_CLASS || attribute < CM_REQ || attribute > CM_DREP)
		return;
	event.head.kind = EVENT_CM;
	event.head.path = path;
	event.head.time_ns = bpf_ktime_get_ns();
	event.key = packet->key;
	load_source(skb, packet, &event.src);
	event.hook = hook;
	event.attribute = attribute;
	event.local_id = load_be32(skb, data);
	if (attribute == CM_REQ) {
		event.qpn = load_be32(skb, data + 32) >> 8;
		event.psn = load_be32(skb, data + 44) >> 8;
	} else {
		event.remote_id = load_be32(skb, data + 4);
	}
	if (attribute == CM_REP) {
		event.qpn = load_be32(skb, data + 12) >> 8;
		event.psn = load_be32(skb, data + 20) >> 8;
	}
	if (attribute == CM_DREQ)
		event.qpn = load_be32(skb, data + 8) >> 8;
	events.ringbuf_output(&event, sizeof(event), 0);
}

#endif /* QPD_CM_H */
