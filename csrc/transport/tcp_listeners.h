// Who may reach the TCP sockets on which a library listens, by the kernel's packet filter. It needs no privilege.
#pragma once

#include <set>
#include <string>
#include <vector>

namespace lamina {

// Descriptors of this process's TCP sockets that listen. Throws ChannelError.
std::set<int> tcp_listeners();

// From now on the kernel drops what comes to these sockets, and to every connection that they accept from now
// on, from other IP addresses than `hosts` (numeric, such as "10.0.0.7"): whoever sends it gets no answer. May be
// called again. Throws ChannelError.
void admit_only(const std::set<int>& listeners, const std::vector<std::string>& hosts);

// From now on the kernel drops what asks this socket for a connection; peers ask again after a second, then after two,
// and so on. Connections stay, those too that wait to be accepted. Throws ChannelError where the system has no such
// filter, or no memory for it.
void refuse_connections(int listener);
// Takes new connections again. Throws ChannelError.
void admit_connections(int listener);

}  // namespace lamina
